# fluxcli from its wheel, with CUDA:
#   docker build -t fluxcli .
#   docker run --rm --gpus all -e HF_TOKEN -v "$PWD:/work" -v fluxcli:/cache fluxcli batch prompts.jsonl -o out
# For a CPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t fluxcli .
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.13-slim
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=parquet,zstd
# Triton compiles its launchers with a C compiler when a shape comes up first.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "torch>=2.11,<2.15" --index-url "$TORCH_INDEX"
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(ls /wheel/*.whl)[$EXTRAS]"
ENV FLUXCLI_CACHE=/cache/fluxcli HF_HOME=/cache/huggingface
WORKDIR /work
ENTRYPOINT ["fluxcli"]
CMD ["--help"]
