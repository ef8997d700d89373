"""Python of a job whose torch is another than its cluster's."""

from importlib import metadata

_version = metadata.version
metadata.version = lambda name: "1.0.0+cu42" if name == "torch" else _version(name)
