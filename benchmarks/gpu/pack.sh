#!/usr/bin/env bash
# pack.sh OUT HAVE: vLLM for a GPU host that reaches no registry, in parts of 62 MB under OUT.
# HAVE is that host's `pip list --format=freeze`; what it lists (PyTorch with CUDA must be in it) is left out.
# Takes about 8 minutes and 9 GB of scratch in ${WORK:-/tmp/elasticmoe-gpu-pack}.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?folder for the parts} have=$(realpath "${2:?pip list --format=freeze of the GPU host}")
mkdir -p "$out"; out=$(realpath "$out")
work=${WORK:-/tmp/elasticmoe-gpu-pack}
mkdir -p "$work"; cd "$work"

uv=$here/../../.venv/bin/uv
[ -x "$uv" ] || uv=uv
target=(--python-platform x86_64-manylinux_2_39 --python-version 3.12 --only-binary :all:)
[ -d site ] || "$uv" pip install -q --target site "${target[@]}" -r "$here/requirements.txt"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_18_x86_64 --platform manylinux2014_x86_64)
python3 -m pip download -q --no-deps -d wheels --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" vllm==0.33.0 nvidia-nccl-cu13==2.30.7 zstandard
python3 "$here/drop_installed.py" site "$have"

# Kernels that neither Triton attention nor a small MoE touches stay behind: they are most of the wheel.
rm -rf vllm-slim && mkdir vllm-slim
(cd vllm-slim && unzip -q ../wheels/vllm-*.whl -x '*_vllm_fa2_C*' '*_vllm_fa3_C*' '*/vllm-rs' '*deep_gemm/*' '*_flashkda*' '*_deepselect*' '*_flashmla_C*' '*_qutlass*' '*fmha_sm100/*')
unzip -q -o -j wheels/vllm-*.whl 'vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so'
unzip -q -o -j wheels/nvidia_nccl*.whl 'nvidia/nccl/lib/libnccl.so.2'
tar -C site -cf - . | zstd -12 -T2 -q -f -o site.tar.zst
tar -C vllm-slim -cf - . | zstd -12 -T2 -q -f -o vllm.tar.zst
zstd -15 -T2 --long=27 -q -f libnccl.so.2 -o nccl.zst
zstd -15 -T2 --long=27 -q -f _vllm_fa3_C.abi3.so -o fa3.zst

cp "$here/unpack.sh" wheels/zstandard*.whl .
tar cf - ./*.zst zstandard*.whl unpack.sh | split -d -b 62000000 - "$out/part."
ls -la "$out"
