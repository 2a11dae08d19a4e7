# Serving: docker build -f docker/serve.Dockerfile -t dlrm-serve .
#   docker run -p 8000:8000 -v "$PWD/models/mine:/model:ro" dlrm-serve
# The server answers whoever reaches the port: say -p 127.0.0.1:8000:8000 for this machine alone, or give --token_file.
FROM python:3.12-slim
# g++ compiles the C++ of --kernels=native at its first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /dlrm_jax
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY dlrm_jax dlrm_jax
RUN pip install --no-cache-dir ".[serve]"
RUN useradd --create-home server
USER server
WORKDIR /model
EXPOSE 8000
ENTRYPOINT ["dlrm-serve", "--model=/model", "--host=0.0.0.0", "--port=8000"]
