# megatron-btx on NVIDIA's PyTorch image, which brings CUDA's torch, Transformer Engine and apex. All three stay as they
# are; megatron-core and the rest come from requirements.lock, by the script that sets up a checkout.
#
#     docker build --build-arg COMMIT="$(git rev-parse HEAD)" --tag megatron-btx .
#     docker run --rm --gpus all megatron-btx btx doctor
#
# 26.07 has Python 3.12, torch 2.13 (here: from 2.10 to below 2.16) and CUDA 13; it needs a driver from 580 on.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

WORKDIR /opt/megatron-btx
COPY . .
# The environment lies in .venv and sees the image's packages. A bare .bootstrap holds uv, which is not needed later.
RUN bash tools/environment.sh --keep-torch \
    && rm -rf .bootstrap /root/.cache \
    && useradd --create-home --shell /bin/bash --uid 10001 btx

ENV PATH=/opt/megatron-btx/.venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1

USER 10001
WORKDIR /home/btx

# What the image has, and one step of a tiny model on the CPU: an image that cannot train is not made.
RUN btx doctor \
    && bash /opt/megatron-btx/tools/first_step.sh /tmp/first-step \
    && rm -rf /tmp/first-step

ARG VERSION=0.1.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="megatron-btx" \
      org.opencontainers.image.description="Branch-Train-MiX on Megatron-core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"

CMD ["btx", "doctor"]
