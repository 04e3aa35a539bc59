"""Settings: what there is (``config``), how one is declared (``fields``), read (``yaml_file``), named (``by_name``)."""

from treelora_cli.config.by_name import from_flags
from treelora_cli.config.config import (
    DEFAULTS,
    LAST_QUARTER,
    AdapterConfig,
    BaseConfig,
    Config,
    GateConfig,
    HeadConfig,
    StreamConfig,
    StreamTask,
    TrainConfig,
    TreeConfig,
    overlay,
    resolve,
    to_dict,
)
from treelora_cli.config.yaml_file import load_config, parse_config, to_yaml

__all__ = [
    "DEFAULTS",
    "LAST_QUARTER",
    "AdapterConfig",
    "BaseConfig",
    "Config",
    "GateConfig",
    "HeadConfig",
    "StreamConfig",
    "StreamTask",
    "TrainConfig",
    "TreeConfig",
    "from_flags",
    "load_config",
    "overlay",
    "parse_config",
    "resolve",
    "to_dict",
    "to_yaml",
]
