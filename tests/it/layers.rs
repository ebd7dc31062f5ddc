//! Checks the architecture: imports go down the layers only and not in cycles, and what belongs to
//! one layer (protobuf, the environment, threads, statuses) stays there. The rules are checked on
//! the source text, so that a breach is also found in code that this platform does not compile.

#![allow(clippy::unwrap_used)]

pub mod scan;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use self::scan::{PathUse, paths};

/// Layers, lowest first. A layer may import itself and those before it.
const LAYERS: [&str; 12] = [
    "domain",
    "telemetry",
    "math",
    "compute",
    "model",
    "formats",
    "infer",
    "train",
    "engine",
    "service",
    "rpc",
    "cli",
];
/// Files that connect all layers.
const EXEMPT: [&str; 2] = ["lib.rs", "main.rs"];
/// Files that start threads: the compute threads, and those of a run's other devices.
const THREADED: [&str; 2] = ["compute/cpu/thread_pool.rs", "infer/data_parallel.rs"];

/// Functions that create a gRPC status.
const STATUS_CONSTRUCTORS: [&str; 22] = [
    "new",
    "ok",
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
    "from_error",
    "with_details",
    "with_error_details",
    "with_error_details_vec",
];

#[test]
fn imports_run_down_the_layers() {
    let sources = sources();
    let imports = sources
        .iter()
        .flat_map(|(_, source)| paths(source))
        .filter(|p| p.segments[0] == "crate" && p.segments.len() > 1)
        .count();
    assert!(
        imports > sources.len(),
        "only {imports} imports seen in {} files: the scan is broken",
        sources.len()
    );
    let breaches: Vec<String> = sources
        .iter()
        .flat_map(|(file, source)| breaches(file, source))
        .collect();
    assert!(
        breaches.is_empty(),
        "{} breaches of the architecture (ARCHITECTURE.md says why):\n{}",
        breaches.len(),
        breaches.join("\n")
    );
}

/// Parts of the names of a model's tensors, in transformers' files and in GGUF.
const TENSOR_NAMES: [&str; 14] = [
    "embed_tokens",
    "lm_head",
    "layernorm",
    "self_attn",
    "_proj",
    "model.layers",
    "model.norm",
    "lora_A",
    "lora_B",
    "token_embd",
    "blk.",
    "attn_q",
    "attn_norm",
    "ffn_",
];

#[test]
fn the_names_of_tensors_are_in_one_table_only() {
    const TABLE: &str = "model/params.rs";
    // The legal values of `target_modules` are in a lower layer than the model; a unit test
    // compares them with the table.
    const DOMAIN: &str = "domain/training.rs";
    for name in TENSOR_NAMES {
        assert!(
            !lines_with(name, |file| file == TABLE).is_empty(),
            "{name} is not in {TABLE}: the scan is broken"
        );
        let elsewhere = lines_with(name, |file| {
            file != TABLE && file != DOMAIN && !file.ends_with("tests.rs")
        });
        assert!(
            elsewhere.is_empty(),
            "only src/{TABLE} may have the names of tensors: {elsewhere:#?}"
        );
    }
}

/// Returns true if a file is compiled with the feature `cuda` only: kernels, and the model on a
/// GPU.
fn is_for_cuda(file: &str) -> bool {
    ["compute", "model"].iter().any(|layer| {
        file == format!("{layer}/cuda.rs") || file.starts_with(&format!("{layer}/cuda/"))
    })
}

/// Only the folders for CUDA have code that exists in one build only. All other code calls methods
/// that exist in both.
#[test]
fn the_feature_cuda_is_tested_once_outside_its_folders() {
    let outside: Vec<String> = lines_with(r#"feature = "cuda""#, |file| !is_for_cuda(file));
    assert_eq!(outside.len(), 1, "{outside:#?}");
    assert!(outside[0].starts_with("model.rs:"), "{outside:#?}");
}

/// Clippy counts the parameters of functions. Nothing may raise its limit or turn it off.
#[test]
fn functions_have_at_most_seven_parameters() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (file, setting) in [
        ("clippy.toml", "too-many-arguments-threshold = 7"),
        ("Cargo.toml", "too_many_arguments = \"deny\""),
    ] {
        let text = fs::read_to_string(root.join(file)).unwrap();
        assert!(
            text.lines().any(|line| line.trim() == setting),
            "{file} lacks `{setting}`"
        );
    }
    let exceptions = lines_with("too_many_arguments", |_| true);
    assert!(
        exceptions.is_empty(),
        "give the arguments a struct with documented fields instead: {exceptions:#?}"
    );
}

/// Every part of the server hangs on `Service`, which therefore stays small: a new part belongs to
/// one of its groups. Only `rpc`, which serves it, takes it as a parameter.
#[test]
fn the_service_has_at_most_five_fields() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/service.rs");
    let source = fs::read_to_string(path).unwrap();
    let (_, rest) = source.split_once("pub struct Service {\n").unwrap();
    let (fields, _) = rest.split_once("\n}").unwrap();
    let fields: Vec<&str> = fields
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("//"))
        .collect();
    assert!((1..=5).contains(&fields.len()), "{fields:#?}");
    let parameter = [": Service,", ": &Service,", ": Service)", ": &Service)"];
    let (serving, others): (Vec<String>, Vec<String>) = parameter
        .iter()
        .flat_map(|form| lines_with(form, |_| true))
        .partition(|line| line.starts_with("rpc.rs:"));
    assert!(!serving.is_empty(), "the scan is broken");
    assert!(others.is_empty(), "{others:#?}");
}

/// Kernels are started only by the typed functions of one file, which check their operands.
#[test]
fn kernels_are_launched_from_one_file() {
    let launches = lines_with("gpu.launch(", is_for_cuda);
    let (typed, raw): (Vec<String>, Vec<String>) = launches
        .into_iter()
        .partition(|line| line.starts_with("compute/cuda/ops.rs:"));
    assert!(
        typed.len() > 20,
        "only {} launches seen: the scan is broken",
        typed.len()
    );
    assert!(
        raw.is_empty(),
        "add a typed function to compute/cuda/ops.rs instead: {raw:#?}"
    );
}

/// The order of a block's steps is in one file and the loop over the blocks in another, for all
/// devices.
#[test]
fn a_block_and_the_loop_over_blocks_are_written_once() {
    const BLOCK: &str = "model/block.rs";
    const PASS: &str = "model/pass.rs";
    let calls = [
        (".new_qkv(", BLOCK),
        (".attention_operand(", BLOCK),
        (".norm(norm, x)", BLOCK),
        (".stream_operand(", BLOCK),
        (".feed_forward(", BLOCK),
        (".feed_forward_backward(", BLOCK),
        ("block_forward(&row.block", PASS),
        ("block_backward(&row.block", PASS),
    ];
    for (call, place) in calls {
        assert!(
            !lines_with(call, |file| file == place).is_empty(),
            "no `{call}` in {place}: the scan is broken"
        );
        let elsewhere = lines_with(call, |file| file != place);
        assert!(
            elsewhere.is_empty(),
            "only {place} may have `{call}`: {elsewhere:#?}"
        );
    }
    for function in ["block_forward", "block_backward"] {
        let elsewhere = lines_with(function, |file| file != BLOCK && file != PASS);
        assert!(
            elsewhere.is_empty(),
            "only {PASS} calls {function}: {elsewhere:#?}"
        );
    }
}

/// Returns the lines of the chosen files that contain `text`, as `file:line: content`.
fn lines_with(text: &str, chosen: impl Fn(&str) -> bool) -> Vec<String> {
    let in_file = |(file, source): &(String, String)| -> Vec<String> {
        let numbered = source
            .lines()
            .enumerate()
            .filter(|(_, line)| line.contains(text));
        numbered
            .map(|(i, line)| format!("{file}:{}: {}", i + 1, line.trim()))
            .collect()
    };
    sources()
        .iter()
        .filter(|(file, _)| chosen(file))
        .flat_map(in_file)
        .collect()
}

/// Returns a message for each breach, with the file and the line. `file` is relative to `src`.
fn breaches(file: &str, source: &str) -> Vec<String> {
    if EXEMPT.contains(&file) {
        return Vec::new();
    }
    let module = module_of(file);
    let Some(rank) = rank(&module) else {
        return vec![format!(
            "src/{file}: belongs to no layer; the layers are {}",
            LAYERS.join(", ")
        )];
    };
    let is_test = |path: &PathUse| module.iter().chain(&path.inside).any(|m| m == "tests");
    let mut found = Vec::new();
    for path in paths(source) {
        let reasons = [
            upward(&module, rank, &path),
            foreign_crate(rank, &path),
            status(file, &path),
            if is_test(&path) {
                None
            } else {
                environment(file, &path).or_else(|| thread(file, rank, &path))
            },
        ];
        found.extend(reasons.into_iter().flatten().map(|why| {
            format!(
                "src/{file}:{}: `{}` {why}",
                path.line,
                path.segments.join("::")
            )
        }));
    }
    found
}

/// Finds imports from a higher layer in any form: `crate::`, a group, or enough `super::`.
fn upward(module: &[String], own: usize, path: &PathUse) -> Option<String> {
    let target = resolve(module, path)?;
    // A name at the root that is no layer counts as the top layer, and so does a glob over the
    // root.
    let theirs = target
        .first()
        .and_then(|name| layer_rank(name))
        .unwrap_or(LAYERS.len() - 1);
    (theirs > own).then(|| {
        let above = target
            .first()
            .filter(|n| layer_rank(n).is_some())
            .map_or("the crate's root", String::as_str);
        format!(
            "runs up from {} to {above}: move what is shared down a layer, or let the lower layer \
             define a channel or trait",
            LAYERS[own]
        )
    })
}

/// Finds the crates for gRPC and protobuf outside of rpc, and the async runtime below the engine.
fn foreign_crate(own: usize, path: &PathUse) -> Option<String> {
    let first = path.segments.first()?;
    let is = |name: &str| {
        first == name
            || first
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('_'))
    };
    if (is("tonic") || is("prost")) && LAYERS[own] != "rpc" {
        return Some(
            "only rpc uses the crates for gRPC and protobuf: in cli, use rpc::client and rpc::pb; \
             below rpc, define a type in that layer and convert it in rpc"
                .into(),
        );
    }
    let engine = layer_rank("engine")?;
    (is("tokio") && own < engine)
        .then(|| format!("{} is synchronous: async begins at the engine", LAYERS[own]))
}

/// Finds a gRPC status that is created outside of the one mapping.
fn status(file: &str, path: &PathUse) -> Option<String> {
    let makes = path
        .segments
        .windows(2)
        .any(|w| w[0] == "Status" && STATUS_CONSTRUCTORS.contains(&w[1].as_str()));
    (makes && file != "rpc/status.rs")
        .then(|| "makes a status: only rpc/status.rs does, from a typed error".into())
}

/// Finds reads of the environment outside of the settings.
fn environment(file: &str, path: &PathUse) -> Option<String> {
    const READS: [&str; 6] = ["var", "var_os", "vars", "vars_os", "set_var", "remove_var"];
    let uses = path
        .segments
        .windows(2)
        .any(|w| w[0] == "env" && (READS.contains(&w[1].as_str()) || w[1] == "*"));
    let allowed = file == "cli/settings.rs" || file.starts_with("cli/settings/");
    (uses && !allowed)
        .then(|| "touches the environment: only cli/settings does; take it as an argument".into())
}

/// Finds threads that are started outside of the engine and [`THREADED`].
fn thread(file: &str, own: usize, path: &PathUse) -> Option<String> {
    const STARTS: [&str; 4] = ["spawn", "Builder", "scope", "*"];
    let starts = path
        .segments
        .windows(2)
        .any(|w| w[0] == "thread" && STARTS.contains(&w[1].as_str()));
    (starts && LAYERS[own] != "engine" && !THREADED.contains(&file)).then(|| {
        format!(
            "starts a thread: only engine and {} do (rpc and cli use tokio)",
            THREADED.join(" and ")
        )
    })
}

/// Returns the path from the crate's root, or `None` if it is not certain that it names a module of
/// this crate.
fn resolve(module: &[String], path: &PathUse) -> Option<Vec<String>> {
    let (first, rest) = path.segments.split_first()?;
    // Alone it is a visibility, `pub(super)`, or the value `self`.
    if rest.is_empty() {
        return None;
    }
    let mut at: Vec<String> = match first.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.iter().chain(&path.inside).cloned().collect(),
        _ => return None,
    };
    for segment in &path.segments[usize::from(first == "crate")..] {
        match segment.as_str() {
            "self" => {}
            "super" => drop(at.pop()),
            name => at.push(name.to_owned()),
        }
    }
    Some(at)
}

/// Returns the module of a file under `src`; `lib.rs` is the root.
fn module_of(file: &str) -> Vec<String> {
    if file == "lib.rs" {
        return Vec::new();
    }
    let path = file.strip_suffix(".rs").unwrap_or(file);
    path.strip_suffix("/mod")
        .unwrap_or(path)
        .split('/')
        .map(str::to_owned)
        .collect()
}

fn rank(module: &[String]) -> Option<usize> {
    module.first().and_then(|name| layer_rank(name))
}

fn layer_rank(name: &str) -> Option<usize> {
    LAYERS.iter().position(|l| *l == name)
}

fn sources() -> Vec<(String, String)> {
    sources_with(&["rs"])
}

/// Returns every file below `src` with one of these extensions: its path under `src`, with forward
/// slashes, and its text.
pub fn sources_with(extensions: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, extensions, &mut files);
    assert!(
        files.len() > LAYERS.len(),
        "found only {} files under {}",
        files.len(),
        root.display()
    );
    files.sort();
    let relative = |p: &Path| {
        p.strip_prefix(&root)
            .unwrap()
            .components()
            .map(|c| c.as_os_str().to_string_lossy())
            .collect::<Vec<_>>()
            .join("/")
    };
    files
        .iter()
        .map(|p| (relative(p), fs::read_to_string(p).unwrap()))
        .collect()
}

fn walk(folder: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, extensions, files);
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|wanted| e == *wanted))
        {
            files.push(path);
        }
    }
}

#[test]
fn no_two_files_import_each_other() {
    let sources = sources();
    let count = imports(&sources).len();
    assert!(
        count > sources.len(),
        "only {count} imports between {} files: the scan is broken",
        sources.len()
    );
    let found = cycles(&sources);
    assert!(
        found.is_empty(),
        "files import each other. Move what they share into a file that imports none of them; a \
         parent that imports its children, if only for `pub use`, must contain nothing that they \
         import:\n{}",
        found.join("\n")
    );
}

/// An import of one file by another; both are indices into the list of sources.
struct Import {
    from: usize,
    to: usize,
    /// The line in `from`.
    line: usize,
}

/// Returns the imports among the files, without tests. `mod x;` is not an import; `x::y` is one if
/// `x` is a child module in a file of its own.
fn imports(sources: &[(String, String)]) -> Vec<Import> {
    let indices: HashMap<Vec<String>, usize> = sources
        .iter()
        .enumerate()
        .map(|(i, (file, _))| (module_of(file), i))
        .collect();
    let mut found = Vec::new();
    for (from, (file, source)) in sources.iter().enumerate() {
        let module = module_of(file);
        let is_test = |path: &PathUse| module.iter().chain(&path.inside).any(|m| m == "tests");
        for path in paths(source)
            .iter()
            .filter(|p| !p.is_visibility && !is_test(p))
        {
            let child = || {
                relative(&module, path)
                    .filter(|target| indices.contains_key(&target[..=module.len()]))
            };
            let target = resolve(&module, path).or_else(child).unwrap_or_default();
            // The names after the file's own are items in it.
            let to = (0..=target.len())
                .rev()
                .find_map(|n| indices.get(&target[..n]).copied());
            if let Some(to) = to.filter(|to| *to != from && !target.is_empty()) {
                found.push(Import {
                    from,
                    to,
                    line: path.line,
                });
            }
        }
    }
    found
}

/// Returns the path from the crate's root if the first name of `path` is a child of `module`.
fn relative(module: &[String], path: &PathUse) -> Option<Vec<String>> {
    let may_be = path.inside.is_empty() && !path.is_external && path.segments.len() > 1;
    may_be.then(|| module.iter().chain(&path.segments).cloned().collect())
}

/// Returns one line for each set of files that import each other, directly or through others.
fn cycles(sources: &[(String, String)]) -> Vec<String> {
    let imports = imports(sources);
    let reached: Vec<BTreeSet<usize>> = (0..sources.len())
        .map(|file| reached_from(file, &imports))
        .collect();
    let (mut found, mut done) = (Vec::new(), BTreeSet::new());
    for file in 0..sources.len() {
        if !reached[file].contains(&file) || done.contains(&file) {
            continue;
        }
        let tangled: BTreeSet<usize> = reached[file]
            .iter()
            .copied()
            .filter(|other| reached[*other].contains(&file))
            .collect();
        found.push(format!(
            "{} ({} files import each other)",
            shortest_cycle(file, &imports, sources),
            tangled.len()
        ));
        done.extend(tangled);
    }
    found
}

/// Returns the files that `file` imports, directly or through others. It contains `file` only if
/// this is in a cycle.
fn reached_from(file: usize, imports: &[Import]) -> BTreeSet<usize> {
    let (mut reached, mut waiting) = (BTreeSet::new(), vec![file]);
    while let Some(from) = waiting.pop() {
        waiting.extend(
            imports
                .iter()
                .filter(|i| i.from == from)
                .map(|i| i.to)
                .filter(|to| reached.insert(*to)),
        );
    }
    reached
}

/// Returns the shortest chain of imports from a file in a cycle back to itself, each with its line.
fn shortest_cycle(start: usize, imports: &[Import], sources: &[(String, String)]) -> String {
    // For each reached file, the import through which it was reached.
    let mut reached_by: HashMap<usize, &Import> = HashMap::new();
    let mut waiting = VecDeque::from([start]);
    while let Some(from) = waiting.pop_front()
        && !reached_by.contains_key(&start)
    {
        for import in imports.iter().filter(|i| i.from == from) {
            reached_by.entry(import.to).or_insert_with(|| {
                waiting.push_back(import.to);
                import
            });
        }
    }
    let (mut chain, mut at) = (format!("src/{}", sources[start].0), start);
    loop {
        let import = reached_by[&at];
        chain = format!("src/{}:{} -> {chain}", sources[import.from].0, import.line);
        at = import.from;
        if at == start {
            return chain;
        }
    }
}

/// Checks that a fabricated file has as many breaches as `expected`, each with the expected text.
#[track_caller]
fn assert_caught(file: &str, source: &str, expected: &[&str]) {
    let found = breaches(file, source);
    assert_eq!(
        found.len(),
        expected.len(),
        "src/{file} with {source:?}: {found:#?}"
    );
    for (breach, part) in found.iter().zip(expected) {
        assert!(breach.contains(part), "{breach:?} should say {part:?}");
    }
}

#[test]
fn an_upward_import_is_caught_however_it_is_written() {
    assert_caught(
        "math/loss.rs",
        "use crate::engine::Job;\n",
        &["src/math/loss.rs:1: `crate::engine::Job` runs up from math to engine"],
    );
    assert_caught(
        "domain/job.rs",
        "\n\nuse crate::{domain::x, rpc::{self, pb::Job as J}};",
        &[":3: `crate::rpc::self`", "crate::rpc::pb::Job"],
    );
    assert_caught(
        "train/trainer.rs",
        "fn f() -> crate::service::Store { crate::service::Store::new() }",
        &["to service", "to service"],
    );
    assert_caught(
        "engine/queue.rs",
        "use super::super::service::store;",
        &["`super::super::service::store` runs up from engine to service"],
    );
    assert_caught(
        "engine/queue.rs",
        "use super::{super::{rpc::x, model::y}, api};",
        &["to rpc"],
    );
    assert_caught(
        "compute/cpu/mod.rs",
        "mod inner { use super::super::super::cli; }",
        &["to cli"],
    );
    assert_caught(
        "model/config.rs",
        "use crate as root;\nuse crate::*;\nuse super::super::*;",
        &["root", "root", "root"],
    );
    assert_caught(
        "model/config.rs",
        "pub(in crate::train) fn f() { crate::run() }",
        &["to train", "the crate's root"],
    );
    assert_caught(
        "model/config.rs",
        "macro_rules! m { () => { $crate::rpc::f() } }",
        &["to rpc"],
    );
    assert_caught(
        "service/mod.rs",
        "use ::bradley_x::y; use crate :: /* up */ rpc :: x;",
        &["to rpc"],
    );
    assert_caught(
        "telemetry/trace.rs",
        "use crate::math::score; use crate::domain::job;",
        &["from telemetry to math"],
    );
    assert_caught(
        "compute/cpu/head.rs",
        "use crate::model::params::ParamId;",
        &["from compute to model"],
    );
    assert_caught(
        "model/parameters.rs",
        "use crate::formats::weights::Weights;",
        &["from model to formats"],
    );
    assert_caught("stray.rs", "", &["belongs to no layer"]);
}

#[test]
fn a_use_outside_its_only_layer_is_caught() {
    assert_caught(
        "service/store.rs",
        "use tonic::Status; use prost_types::Any;",
        &["only rpc", "only rpc"],
    );
    assert_caught(
        "service/store.rs",
        "use ::tonic::Status; pub use ::prost::Message;",
        &["only rpc", "only rpc"],
    );
    assert_caught(
        "train/trainer.rs",
        "use tokio::sync::mpsc;",
        &["train is synchronous"],
    );
    assert_caught(
        "rpc/scoring.rs",
        "let e = tonic::Status::internal(\"x\");",
        &["makes a status"],
    );
    assert_caught(
        "rpc/scoring.rs",
        "return Err(Status::new(Code::Ok, m));",
        &["makes a status"],
    );
    assert_caught(
        "formats/source.rs",
        "let t = std::env::var(\"HF_TOKEN\");",
        &["touches the environment"],
    );
    assert_caught(
        "cli/demo.rs",
        "use std::env::{self, var_os};",
        &["touches the environment"],
    );
    assert_caught(
        "service/runner.rs",
        "std::thread::spawn(|| ()); thread::Builder::new();",
        &["starts a thread", "starts a thread"],
    );
}

#[test]
fn legal_code_has_no_breach() {
    for (file, source) in [
        (
            "math/loss.rs",
            "use crate::domain::dpo; use super::metrics; pub(crate) mod x; pub(super) fn f() {}",
        ),
        (
            "engine/queue/tests.rs",
            "use super::super::api; use super::*; std::thread::spawn(f);",
        ),
        (
            "compute/cpu.rs",
            "#[cfg(test)] mod tests { use super::*; use super::super::config; }",
        ),
        (
            "compute/cpu.rs",
            "// use crate::rpc;\n/* crate::rpc /* crate::cli */ */ /// [`crate::rpc`]\n\
             const S: &str = \"crate::rpc::x\";",
        ),
        (
            "compute/cpu.rs",
            "const S: &[u8] = br#\"\" crate::rpc \"#; const C: char = '\"'; \
             fn f<'a>(x: &'a str) { let c = b'\\''; }",
        ),
        (
            "engine/worker.rs",
            "use tokio::sync::oneshot; match s { Status::Finished => std::thread::Builder::new() }",
        ),
        (
            "rpc.rs",
            "use tonic::transport::Server; use self::pb::x; pub use self::http::serve_http;",
        ),
        (
            "rpc/status.rs",
            "Status::with_error_details(code, m, d); tonic::Code::Ok;",
        ),
        ("cli/settings.rs", "std::env::vars_os();"),
        (
            "cli/demo.rs",
            "use crate::rpc::{client::Client, pb}; std::env::temp_dir(); \
             std::thread::available_parallelism();",
        ),
        ("main.rs", "bradley::cli::main()"),
    ] {
        assert_caught(file, source, &[]);
    }
}

/// Checks that `cycles` of fabricated files are exactly these.
#[track_caller]
fn assert_cycles(files: &[(&str, &str)], expected: &[&str]) {
    let sources: Vec<(String, String)> = files
        .iter()
        .map(|(file, source)| ((*file).to_owned(), (*source).to_owned()))
        .collect();
    assert_eq!(cycles(&sources), expected, "{files:#?}");
}

#[test]
fn an_import_cycle_is_caught_however_it_is_written() {
    // Directly, through others, and with a tail that is in no cycle.
    let direct = [
        ("math/a.rs", "use super::b::X;"),
        ("math/b.rs", "\nfn f() { crate::math::a::g() }"),
        ("math/c.rs", "use super::a;"),
    ];
    assert_cycles(
        &direct,
        &["src/math/a.rs:1 -> src/math/b.rs:2 -> src/math/a.rs (2 files import each other)"],
    );
    let through = [
        ("math/a.rs", "use crate::math::{x, b::{self, X}};"),
        ("math/b.rs", "use super::c::*;"),
        ("math/c.rs", "use super::a::Y;"),
    ];
    assert_cycles(
        &through,
        &[
            "src/math/a.rs:1 -> src/math/b.rs:1 -> src/math/c.rs:1 -> src/math/a.rs (3 files \
             import each other)",
        ],
    );
    // The shortest one is shown of several that meet.
    let meeting = [
        ("math/a.rs", "use super::b;\nuse super::c;"),
        ("math/b.rs", "use super::c;"),
        ("math/c.rs", "use super::a;"),
    ];
    assert_cycles(
        &meeting,
        &["src/math/a.rs:2 -> src/math/c.rs:1 -> src/math/a.rs (3 files import each other)"],
    );
    // A parent that uses its child, in both module styles and in every spelling.
    for parent in [
        "mod c;\nfn f() { c::g() }",
        "pub mod c;\npub use self::c::g;",
        "mod c;\npub(crate) use c::{g, h};",
        "\nuse crate::math::p::c;",
    ] {
        for file in ["math/p.rs", "math/p/mod.rs"] {
            let files = [(file, parent), ("math/p/c.rs", "fn g() { super::x() }")];
            let expected = format!(
                "src/{file}:2 -> src/math/p/c.rs:1 -> src/{file} (2 files import each other)"
            );
            assert_cycles(&files, &[&expected]);
        }
    }
    // From an inline module, where `super` is the file itself.
    let inline = [
        ("math/a.rs", "mod x { use super::super::b; }"),
        (
            "math/b.rs",
            "mod y { mod z { use super::super::super::a::X; } }",
        ),
    ];
    assert_cycles(
        &inline,
        &["src/math/a.rs:1 -> src/math/b.rs:1 -> src/math/a.rs (2 files import each other)"],
    );
    let root = [
        ("lib.rs", "pub mod cli;\npub use cli::X;"),
        ("cli/mod.rs", "use crate::Y;"),
    ];
    assert_cycles(
        &root,
        &["src/lib.rs:2 -> src/cli/mod.rs:1 -> src/lib.rs (2 files import each other)"],
    );
}

#[test]
fn imports_without_a_cycle_pass() {
    let passes = |files: &[(&str, &str)]| assert_cycles(files, &[]);
    // A parent that declares its children, and children that share a file.
    passes(&[
        ("math/p.rs", "mod c;\npub mod d;\nmod e;"),
        ("math/p/c.rs", "use super::{X, d};"),
        ("math/p/d.rs", "use super::X;"),
    ]);
    passes(&[
        ("math/p.rs", "mod c;\nmod d;\npub use self::c::X;"),
        ("math/p/c.rs", "use super::d;"),
        ("math/p/d.rs", "use crate::math::q;"),
    ]);
    // Tests, visibilities, comments, strings, and names of other crates.
    for source in [
        "mod tests { use super::super::b::X; }",
        "pub(in crate::math::b) fn f() {} pub(super) fn g() {} pub(crate) struct S;",
        "/// [`super::b::X`]\n// use super::b;\nconst B: &str = \"super::b::X\";",
        "use b::X; use ::a::b; mod x { use super::b::X; }",
    ] {
        passes(&[("math/a.rs", source), ("math/b.rs", "use super::a;")]);
    }
    passes(&[
        (
            "math/a.rs",
            "mod c;\nuse ::c::X;\nfn f() { ::c::g() }\nmod x { fn f() { c::g() } }",
        ),
        ("math/a/c.rs", "use super::Y;"),
    ]);
    passes(&[
        ("math/a.rs", "use super::b;"),
        ("math/b/tests.rs", "use crate::math::a; use super::X;"),
        ("math/b.rs", "mod tests;"),
    ]);
}

/// Returns the page with the map of the modules.
fn architecture() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap()
}

/// Returns the texts between backticks, line by line.
fn quoted(text: &str) -> Vec<&str> {
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .collect()
}

/// Returns the quoted paths of Rust files that are neither in the repository nor under `src`.
fn missing_files(text: &str) -> Vec<&str> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_path = |word: &&str| {
        word.contains('/') && word.ends_with(".rs") && !word.contains(['*', '{', ' '])
    };
    let exists = |path: &str| root.join(path).is_file() || root.join("src").join(path).is_file();
    quoted(text)
        .into_iter()
        .filter(is_path)
        .filter(|path| !exists(path))
        .collect()
}

#[test]
fn every_path_in_the_map_exists() {
    let text = architecture();
    let paths = quoted(&text)
        .into_iter()
        .filter(|word| word.contains('/') && word.ends_with(".rs"))
        .count();
    assert!(
        paths > 20,
        "only {paths} paths seen in ARCHITECTURE.md: the scan is broken"
    );
    let missing = missing_files(&text);
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md names files that do not exist: {missing:#?}"
    );
    let text = "see `src/lib.rs`, `math/loss.rs` and `x.rs`, \
                not `math/no_such_file.rs` or `src/no_such_file.rs`";
    assert_eq!(
        missing_files(text),
        ["math/no_such_file.rs", "src/no_such_file.rs"]
    );
}

/// Returns the rows of the table of layers: the name in the first cell, and the quoted names in the
/// second one.
fn rows_of_the_table(text: &str) -> Vec<(&str, Vec<&str>)> {
    let rows = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    rows.map(|(name, cell)| (name, quoted(cell))).collect()
}

/// Returns the names of the modules and folders in a folder, with those of the folders below it if
/// `deep`.
fn modules_in(folder: &Path, deep: bool) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if deep {
                names.extend(modules_in(&path, true));
            }
            names.insert(name);
        } else if path.extension().is_some_and(|e| e == "rs") {
            names.insert(name);
        }
    }
    names.remove("tests");
    names
}

#[test]
fn the_table_of_layers_lists_every_module_and_no_other() {
    let text = architecture();
    let rows = rows_of_the_table(&text);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let layers = modules_in(&source, false);
    let expected: BTreeSet<String> = LAYERS
        .iter()
        .chain(&["lib", "main"])
        .map(|name| (*name).to_owned())
        .collect();
    assert_eq!(layers, expected, "the folders of src are not the layers");
    for layer in LAYERS {
        let of_layer = |name: &str| {
            name == layer
                || name
                    .strip_prefix(layer)
                    .is_some_and(|rest| rest.starts_with('/'))
        };
        let listed: BTreeSet<&str> = rows
            .iter()
            .filter(|(name, _)| of_layer(name))
            .flat_map(|(name, words)| words.iter().copied().chain(name.rsplit('/').next()))
            .collect();
        let folder = source.join(layer);
        let unlisted: Vec<String> = modules_in(&folder, false)
            .into_iter()
            .filter(|name| !listed.contains(name.as_str()))
            .collect();
        assert!(
            unlisted.is_empty(),
            "the row of `{layer}` in ARCHITECTURE.md lacks {unlisted:?}"
        );
        let below = modules_in(&folder, true);
        let is_name = |word: &&str| {
            !LAYERS.contains(word)
                && word
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let gone: Vec<&str> = listed
            .into_iter()
            .filter(|word| *word != layer)
            .filter(is_name)
            .filter(|word| !below.contains(*word))
            .collect();
        assert!(
            gone.is_empty(),
            "the row of `{layer}` in ARCHITECTURE.md names modules that do not exist: {gone:?}"
        );
    }
}
