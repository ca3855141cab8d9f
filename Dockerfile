# softmod on a CPU or an NVIDIA GPU (with the container toolkit: docker run --gpus all ...).
#   docker build --tag softmod .
#   docker run --rm --volume "$PWD/runs:/experiments/runs" softmod env=mt10 seed=0 tracking=journal
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev git libegl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/softmod
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY softmod softmod
RUN pip install --no-cache-dir -c constraints.txt ".[video,launchers,search]"

# Runs, the MLflow store and caches lie in /experiments, which any user can write.
RUN mkdir /experiments && chmod 777 /experiments
WORKDIR /experiments
ENV SOFTMOD_CACHE=/experiments/.cache MUJOCO_GL=egl
ENTRYPOINT ["softmod-train"]
