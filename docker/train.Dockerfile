# Training: docker build -f docker/train.Dockerfile -t dlrm-train .
#   docker run -v "$PWD:/work" dlrm-train --data_dir=data/mine --workdir=runs/mine
# On NVIDIA GPUs: --build-arg EXTRA=gpu, and docker run --gpus=all. Another command: --entrypoint=dlrm-prepare, and so on.
FROM python:3.12-slim
# g++ compiles the C++ kernels at their first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /dlrm_jax
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY dlrm_jax dlrm_jax
ARG EXTRA=serve
RUN pip install --no-cache-dir ".[${EXTRA}]"
WORKDIR /work
ENTRYPOINT ["dlrm-train"]
