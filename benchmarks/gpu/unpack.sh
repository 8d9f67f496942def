#!/usr/bin/env bash
# unpack.sh FOLDER: lay out what pack.sh made; its parts are in FOLDER. Then FOLDER/site goes on PYTHONPATH and FOLDER/libnccl.so.2 is preloaded.
set -euo pipefail
cd "${1:?folder with the parts}"
cat part.* >pack.tar && rm part.* && tar xf pack.tar && rm pack.tar && mkdir -p site
python3 - <<'PY'
import glob, shutil, sys, tarfile, zipfile

zipfile.ZipFile(glob.glob("zstandard*.whl")[0]).extractall("zstd")
sys.path.insert(0, "zstd")
import zstandard

inflate = zstandard.ZstdDecompressor(max_window_size=2**31)
for archive in ("site.tar.zst", "vllm.tar.zst"):
    with open(archive, "rb") as packed:
        stream = inflate.stream_reader(packed, read_across_frames=True)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall("site", filter="fully_trusted")
for packed_name, name in (("fa3.zst", "site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"), ("nccl.zst", "libnccl.so.2")):
    with open(packed_name, "rb") as packed, open(name, "wb") as plain:
        shutil.copyfileobj(inflate.stream_reader(packed, read_across_frames=True), plain, 1 << 24)
PY
python3 -m compileall -q -j 0 site >/dev/null 2>&1 || true
PYTHONPATH=$PWD/site python3 -c 'import torch, vllm; print("vLLM", vllm.__version__, "on PyTorch", torch.__version__)'
