# syntax=docker/dockerfile:1
# `bradley serve` on a CPU (target cpu, the default):
#   docker build -t bradley . && docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:9464:9464 \
#     -v bradley:/var/lib/bradley -e BRADLEY_MODELS=HuggingFaceTB/SmolLM2-135M-Instruct bradley
# Without 127.0.0.1, other machines reach the ports, too, and everyone may do everything.
# `docker stop` kills after 10 seconds: `docker stop -t 70` lets a running job write a checkpoint.
# With CUDA (target cuda): docker build --target cuda -t bradley:0.3.0-cuda .
# Run it with `docker run --gpus all`: without a GPU it computes on the CPU. The chart adds -cuda to
# the tag of pods with a GPU.
# Without an image registry: deploy/image/build.

# Every base image is an argument, so that a mirror or a local image can replace it.
ARG BUILD_IMAGE=rust:1.95-bookworm
# glibc must not be newer than the run-time image's: Ubuntu 22.04 has 2.35, Debian 12 has 2.36.
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu22.04
# glibc, libgcc and CA certificates; no shell and no package manager.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# Builds like cargo, and writes the list of crates into the binary (section .dep-v0), which trivy,
# syft and grype read.
RUN cargo install --locked --root /usr/local cargo-auditable@0.7.7
# Without debug information, because `strip` removes it anyway.
ENV CARGO_PROFILE_RELEASE_DEBUG=false

# Builds the dependencies alone, so that this layer is built again only when they change.
COPY Cargo.toml Cargo.lock ./
# The workspace needs this file, but the fuzz targets are not built.
COPY tests/fuzz/Cargo.toml tests/fuzz/
RUN mkdir src && echo 'fn main() {}' >build.rs && cp build.rs src/main.rs && touch src/lib.rs \
    && cargo auditable build --release --locked && rm -r build.rs src

COPY build.rs ./
COPY proto proto
COPY src src
# Copied files keep their modification times. Without touch, cargo would take the stubs of the layer
# above for newer and not build again. The stub's program is removed, so that it cannot be shipped.
# out/ has the files for the image: the program, and the data folder, which cannot be created in the
# run-time image, because that has no shell.
RUN touch build.rs src/lib.rs src/main.rs && rm target/release/bradley && cargo auditable build --release --locked \
    && mkdir -p out/data && strip -o out/bradley target/release/bradley


FROM ${BUILD_IMAGE} AS rust

# The same as `build`, with the CUDA toolkit, whose nvcc build.rs calls. Version 13.0, because every
# driver from 580 on can load its output.
FROM ${CUDA_BUILD_IMAGE} AS build-cuda
WORKDIR /build
# Versions are not pinned, because mirrors delete old ones and the packages are not in the image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
ENV PATH=/usr/local/cargo/bin:$PATH \
    CARGO_HOME=/usr/local/cargo \
    RUSTUP_HOME=/usr/local/rustup \
    CARGO_PROFILE_RELEASE_DEBUG=false
RUN cargo install --locked --root /usr/local cargo-auditable@0.7.7
COPY Cargo.toml Cargo.lock ./
COPY tests/fuzz/Cargo.toml tests/fuzz/
RUN mkdir src && echo 'fn main() {}' >build.rs && cp build.rs src/main.rs && touch src/lib.rs \
    && cargo auditable build --release --locked --features cuda && rm -r build.rs src
COPY build.rs ./
COPY proto proto
COPY src src
RUN touch build.rs src/lib.rs src/main.rs && rm target/release/bradley && cargo auditable build --release --locked --features cuda \
    && mkdir -p out/data out/lib && strip -o out/bradley target/release/bradley \
    && cp -L /usr/local/cuda/lib64/libcublas.so.13 /usr/local/cuda/lib64/libcublasLt.so.13 out/lib/


# The image without the program and the data folder.
FROM ${RUNTIME_IMAGE} AS runtime
COPY LICENSE /usr/share/doc/bradley/LICENSE
# The user is a number, so that Kubernetes can check that it is not root.
USER 10001:10001
WORKDIR /
# HF_HOME: models from the hub are stored on the data volume, so that they survive restarts.
ENV BRADLEY_LISTEN=0.0.0.0:50051 \
    BRADLEY_HTTP_LISTEN=0.0.0.0:9464 \
    BRADLEY_DATA_DIR=/var/lib/bradley/data \
    HF_HOME=/var/lib/bradley/huggingface
EXPOSE 50051 9464
# The start period covers a first download of the model. For another port, TLS or a client
# certificate set BRADLEY_SERVER, BRADLEY_TLS_SERVER_CA, BRADLEY_TLS_CLIENT_CERT, …
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/usr/local/bin/bradley", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/bradley"]
CMD ["serve"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="bradley" \
      org.opencontainers.image.description="Trains language models with Direct Preference Optimization over gRPC and scores preference pairs with them." \
      org.opencontainers.image.source="https://github.com/bradley-dpo/bradley" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM runtime AS cuda
# The NVIDIA container toolkit reads the first two, and adds libcuda, which is part of the driver.
# GKE's own device plugin mounts the driver as /usr/local/nvidia instead.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/lib:/usr/local/nvidia/lib64 \
    BRADLEY_DEVICE=auto \
    CUDA_CACHE_PATH=/var/lib/bradley/cuda-cache
COPY --from=build-cuda /build/out/lib /usr/local/lib
COPY --from=build-cuda /build/out/bradley /usr/local/bin/bradley
COPY --from=build-cuda --chown=10001:10001 /build/out/data /var/lib/bradley
VOLUME /var/lib/bradley


FROM runtime AS cpu
COPY --from=build /build/out/bradley /usr/local/bin/bradley
# A new volume gets the owner of this folder.
COPY --from=build --chown=10001:10001 /build/out/data /var/lib/bradley
# Last, because some builders discard files that are added to a volume afterwards.
VOLUME /var/lib/bradley
