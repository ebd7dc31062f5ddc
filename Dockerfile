# syntax=docker/dockerfile:1
# `bradley serve` on a CPU (target cpu, the default):
#   docker build -t bradley . && docker run -p 50051:50051 -p 9090:9090 -v bradley:/var/lib/bradley \
#     -e BRADLEY_MODELS=HuggingFaceTB/SmolLM2-135M-Instruct bradley
# With CUDA (target cuda): docker build --target cuda -t bradley:cuda .
# Without an image registry: deploy/image/build.

# Every base is an argument, so that a mirror or a local image can take its place.
ARG BUILD_IMAGE=rust:1.95-bookworm
# glibc must not be newer than the run-time image's: Ubuntu 22.04 has 2.35, Debian 12 has 2.36.
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu22.04
# glibc, libgcc and CA certificates; no shell and no package manager.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# Builds as cargo does and writes the list of crates into the binary (section .dep-v0), where trivy, syft and grype read it.
RUN cargo install --locked --root /usr/local cargo-auditable@0.7.7
# Backtraces lose their lines to `strip` anyway.
ENV CARGO_PROFILE_RELEASE_DEBUG=false

# Dependencies alone, so that this layer is made again only when they change.
COPY Cargo.toml Cargo.lock ./
# Only named by the workspace: nothing of it is built.
COPY tests/fuzz/Cargo.toml tests/fuzz/
RUN mkdir src && echo 'fn main() {}' >build.rs && cp build.rs src/main.rs && touch src/lib.rs \
    && cargo auditable build --release --locked && rm -r build.rs src

COPY build.rs ./
COPY proto proto
COPY src src
# Copied files keep their old times; without touch cargo would take the stubs for newer. The stub's program must not be what is shipped.
# out/ is what the image gets: the program, and the data folder, which no RUN could make where there is no shell.
RUN touch build.rs src/lib.rs src/main.rs && rm target/release/bradley && cargo auditable build --release --locked \
    && mkdir -p out/data && strip -o out/bradley target/release/bradley


FROM ${BUILD_IMAGE} AS rust

# As `build`, with the CUDA toolkit, whose nvcc build.rs calls. CUDA 13.0: drivers from 580 on load what it makes.
FROM ${CUDA_BUILD_IMAGE} AS build-cuda
WORKDIR /build
# hadolint ignore=DL3008 # Old versions vanish from the mirrors; nothing of these packages is in the image.
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


# All of an image but the program and the data folder.
FROM ${RUNTIME_IMAGE} AS runtime
COPY LICENSE /usr/share/doc/bradley/LICENSE
# By number, so that Kubernetes can check that it is not root.
USER 10001:10001
WORKDIR /
# HF_HOME: models from the hub are kept with the data, across restarts.
ENV BRADLEY_LISTEN=0.0.0.0:50051 \
    BRADLEY_HTTP_LISTEN=0.0.0.0:9090 \
    BRADLEY_DATA_DIR=/var/lib/bradley/data \
    HF_HOME=/var/lib/bradley/huggingface
EXPOSE 50051 9090
# The start period covers a first download of the model. Another port, TLS or a client certificate: BRADLEY_SERVER, BRADLEY_TLS_SERVER_CA, …
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
# libcuda comes with the driver, from the NVIDIA container toolkit, which reads the first two.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/lib \
    BRADLEY_DEVICE=auto \
    CUDA_CACHE_PATH=/var/lib/bradley/cuda-cache
COPY --from=build-cuda /build/out/lib /usr/local/lib
COPY --from=build-cuda /build/out/bradley /usr/local/bin/bradley
COPY --from=build-cuda --chown=10001:10001 /build/out/data /var/lib/bradley
VOLUME /var/lib/bradley


FROM runtime AS cpu
COPY --from=build /build/out/bradley /usr/local/bin/bradley
# A new volume takes its owner from this folder.
COPY --from=build --chown=10001:10001 /build/out/data /var/lib/bradley
# Last: some builders throw away what comes into a volume afterwards.
VOLUME /var/lib/bradley
