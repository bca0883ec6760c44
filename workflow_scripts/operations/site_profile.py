"""What a Snakemake profile says of a cluster: which partition, how much memory and time each stage asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.errors import ConfigError

FILES = ("profile.v9+.yaml", "profile.yaml", "config.v9+.yaml", "config.yaml")


@dataclass(frozen=True)
class Profile:
    """A profile's content."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Profile:
        """Read the profile in a directory.

        Raises:
            ConfigError: if there is none, or it is not YAML.
        """
        path = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if path is None:
            raise ConfigError(
                f"--profile {folder}: there is no {FILES[-1]} in it; slurm_profile is the one that is shipped"
            )
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: holds no keys")
        return cls(path, content)

    def setting(self, name: str) -> Any:
        """Return a command-line option such as ``slurm-qos``; None if it is not set."""
        return self.content.get(name)

    def resource(self, stage: str, name: str) -> Any:
        """Return what a stage asks for of a resource, by its own setting or the default; None if nothing is said."""
        own = (self.content.get("set-resources") or {}).get(stage) or {}
        return own.get(name, (self.content.get("default-resources") or {}).get(name))

    def number(self, stage: str, name: str, otherwise: float) -> float:
        """Return a resource as a number, that of the first attempt where it grows with them."""
        value = self.resource(stage, name)
        if value is None:
            return otherwise
        found = re.match(r"\s*(\d+(?:\.\d+)?)\s*(?:\*\s*attempt\s*)?$", str(value))
        if found is None:
            raise ConfigError(f"{self.path}: {stage}.{name}: got {value!r}; write a number, or NUMBER * attempt")
        return float(found[1])

    def threads(self, stage: str) -> int:
        """Return the CPUs of a stage's jobs."""
        return int((self.content.get("set-threads") or {}).get(stage, 1))
