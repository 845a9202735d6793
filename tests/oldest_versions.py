"""Prints constraints that pin what users get to the oldest versions that pyproject.toml promises.

What only developers install stays at the versions of constraints.txt.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oldest() -> dict[str, str]:
    """Name -> lower bound of each dependency of the package, and of what reads directories."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *extras["hf"], *extras["demo"]]
    found = (re.match(r"([\w-]+)>=([\d.]+)", wanted) for wanted in every)
    return {match[1]: match[2] for match in found if match}


def main() -> None:
    """Writes one line for each package."""
    pins = oldest()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.partition("==")[0].replace("_", "-").lower()
        if name not in pins:
            print(line)
    for name, version in pins.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
