# What engines for tests run in: the simulated engine in /opt/sim, and the system libraries that vLLM on CPU needs. vLLM
# itself is mounted, at the path where `make vllm-cpu` made it; its virtual environment refers to the Python that it was
# made with, so PYTHON_IMAGE has the same Python (X.Y) and PYTHON_HOME is where that Python was installed.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE images/install.sh wheels* ./
RUN sh install.sh dependencies /opt/sim sim
COPY protocol protocol
COPY coordinator coordinator
COPY sidecar sidecar
COPY engine engine
COPY operator operator
COPY cli cli
COPY engines engines
RUN sh install.sh product /opt/sim
RUN /opt/sim/bin/python3 -c 'from elasticmoe_sim.model import write_model; from pathlib import Path; write_model(Path("/opt/sim-model"))'

FROM ${PYTHON_IMAGE}
RUN ldconfig -p | grep -q libnuma.so.1 \
    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*; }
ARG PYTHON_HOME=/usr
# Links to Python's command and library from there; its folders can be entered by any user, and so can /root, where what
# root made is mounted.
RUN name=$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])') \
    && library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') \
    && mkdir -p ${PYTHON_HOME}/bin ${PYTHON_HOME}/lib \
    && { [ -e ${PYTHON_HOME}/bin/$name ] || ln -s $(command -v $name) ${PYTHON_HOME}/bin/$name; } \
    && { [ -e ${PYTHON_HOME}/lib/$name ] || ln -s $library ${PYTHON_HOME}/lib/$name; } \
    && folder=${PYTHON_HOME} && while [ "$folder" != / ]; do chmod a+rx "$folder"; folder=$(dirname "$folder"); done \
    && mkdir -p /root && chmod a+rx /root
COPY --from=build /opt/sim /opt/sim
COPY --from=build /opt/sim-model /opt/sim-model
# This project's plugin for vLLM on CPU: the mounted environment knows it by the path of a checkout only.
COPY engines/elasticmoe_vllm_cpu /opt/elasticmoe/plugin/elasticmoe_vllm_cpu
# Caches go to a place that can be written; a user without a name gets one.
ENV PATH=/opt/sim/bin:$PATH PYTHONPATH=/opt/elasticmoe/plugin HOME=/tmp LOGNAME=engine PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /
USER 65532:65532
CMD ["python3", "-m", "elasticmoe_sim"]
