"""The container image of every step, named once."""

from defense_core import __version__

IMAGE = f"model-quarantine:{__version__}"
