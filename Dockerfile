# Granary on a machine with NVIDIA GPUs: docker build -t granary . && docker run --gpus all -v $PWD:/work granary train ...
# torch's wheels bring CUDA; the host needs NVIDIA's driver and container toolkit alone. Triton compiles its launchers: gcc.
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u* \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY conf conf
COPY granary granary
COPY shared shared
COPY stage_eval stage_eval
COPY stage_harvest stage_harvest
COPY stage_inspect stage_inspect
COPY stage_trace stage_trace
COPY stage_train stage_train
RUN pip install --no-cache-dir -c constraints.txt ".[explain,explore,hub,s3,triton]" \
 && useradd --create-home --uid 1000 granary
# Runs, stores and models lie outside of the image.
USER 1000
WORKDIR /work
ENV HF_HOME=/work/.cache/huggingface
ENTRYPOINT ["granary"]
CMD ["--help"]
