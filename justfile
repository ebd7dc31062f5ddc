# `just` lists these recipes, each with the last line of its comment. Each of them is only a short
# name for plain commands.

_default:
    @just --list

# Runs the tests that need no tools; the others are shown as ignored.
test *args:
    cargo test {{ args }}

# The first time, this fetches the tools, which take about 6 GB. One of the tests mounts control
# groups, and fails without root.
# Runs all tests but those for a GPU and one that scores a million rows.
test-all *args:
    eval "$(.ci/run setup | grep '^export')" \
        && cargo test {{ args }} -- --include-ignored --skip a_million_rows

# Checks formatting, clippy and docs.
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# Trains and scores a real model over loopback gRPC.
demo *args:
    cargo run --release -- demo {{ args }}

# tests/goldens/README.md has the commands for evaluation.json, generation.json and smollm2.json,
# and tests/fuzz/seeds.py writes parquet/.
# Generates the other golden files.
goldens:
    python3 -m venv target/goldens-venv
    target/goldens-venv/bin/pip install --quiet -r tests/goldens/requirements.txt
    cd tests/goldens && ../../target/goldens-venv/bin/python generate.py
    cd tests/goldens && ../../target/goldens-venv/bin/python parameters.py
    cd tests/goldens && ../../target/goldens-venv/bin/python shapes.py

# Runs everything that has to pass before a change lands; as root on Debian.
ci:
    .ci/run
