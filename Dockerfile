# syntax=docker/dockerfile:1
# `bradley serve` on a CPU: docker build -t bradley . && docker run -p 50051:50051 -p 9090:9090 -v bradley:/var/lib/bradley \
#   -e BRADLEY_MODELS=HuggingFaceTB/SmolLM2-135M-Instruct bradley

FROM rust:1.95-bookworm AS build
WORKDIR /build

# Dependencies alone, so that this layer is made again only when they change.
COPY Cargo.toml Cargo.lock ./
# Only named by the workspace: nothing of it is built.
COPY tests/fuzz/Cargo.toml tests/fuzz/
RUN mkdir src && echo 'fn main() {}' | tee build.rs src/main.rs && touch src/lib.rs \
    && cargo build --release --locked && rm -r build.rs src

COPY build.rs ./
COPY proto proto
COPY src src
# Copied files keep their old times; without touch cargo would take the stubs for newer.
RUN touch build.rs src/lib.rs src/main.rs && cargo build --release --locked && strip target/release/bradley

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="bradley" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/bradley --create-home bradley
COPY --from=build /build/target/release/bradley /usr/local/bin/bradley
COPY LICENSE /usr/share/doc/bradley/LICENSE

# By number, so that Kubernetes can check that it is not root.
USER 10001:10001
WORKDIR /var/lib/bradley
VOLUME /var/lib/bradley
# HF_HOME: models from the hub are kept with the data, across restarts.
ENV BRADLEY_LISTEN=0.0.0.0:50051 \
    BRADLEY_HTTP_LISTEN=0.0.0.0:9090 \
    BRADLEY_DATA_DIR=/var/lib/bradley/data \
    HF_HOME=/var/lib/bradley/huggingface
EXPOSE 50051 9090
# The start period covers a first download of the model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["bradley", "health", "--server", "http://127.0.0.1:50051"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bradley"]
CMD ["serve"]
