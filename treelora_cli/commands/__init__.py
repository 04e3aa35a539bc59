"""One thin file per command: parse, call one core function, render."""
