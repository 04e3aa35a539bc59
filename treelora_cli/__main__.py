"""Run the command line as ``python -m treelora_cli``."""

from treelora_cli.app import main

if __name__ == "__main__":
    main()
