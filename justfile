# `just` lists these. Everything they do is also a plain command.

_default:
    @just --list

# What `cargo test` covers without tools; the tests that need one are counted as ignored.
test *args:
    cargo test {{ args }}

# All tests: the real model, a Python client, grpcurl, PEFT. Downloads about 3 GB the first time.
test-all *args:
    eval "$(.ci/run setup | grep '^export')" && cargo test {{ args }} -- --include-ignored

# Formatting, clippy, docs.
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# Trains and scores a real model over loopback gRPC.
demo *args:
    cargo run --release -- demo {{ args }}

# Makes the golden files again from transformers, trl and peft (tests/goldens/README.md).
goldens:
    python3 -m venv target/goldens-venv
    target/goldens-venv/bin/pip install --quiet -r tests/goldens/requirements.txt
    cd tests/goldens && ../../target/goldens-venv/bin/python generate.py
    cd tests/goldens && ../../target/goldens-venv/bin/python parameters.py
    cd tests/goldens && ../../target/goldens-venv/bin/python shapes.py

# Everything that has to pass before a change lands.
ci:
    .ci/run
