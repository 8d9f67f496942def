"""Remove from a `pip --target` folder what another host already has.

Usage: `drop_installed.py FOLDER PIP_LIST`
"""

import re
import shutil
import sys
from pathlib import Path

# Newer ones than a host is likely to have, and vLLM needs them so.
KEEP = {"fastapi", "starlette", "httpx", "pyzmq", "msgspec"}
# Namespaces that several distributions share: taking one out whole would break the others.
SHARED = {"google", "opentelemetry", "bin", "", ".."}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(site: Path, listing: Path) -> None:
    have = {normal(re.split(r"[=@ ]", line)[0]) for line in listing.read_text().splitlines()}
    for info in site.glob("*.dist-info"):
        name = normal(re.split(r"-\d", info.name)[0])
        if name in KEEP or not (name in have or name.startswith("nvidia-")):
            continue
        tops = {
            line.split(",")[0].split("/")[0] for line in (info / "RECORD").read_text().splitlines()
        }
        for top in tops - SHARED:
            path = site / top
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for rest in ("bin", "nvidia", "cuda"):
        shutil.rmtree(site / rest, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
