//! Errors that people meet on their first day with a server: each names the setting or flag, the
//! place and the remedy.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use crate::server::{Server, free_port};
use crate::support::golden;

fn bradley(args: &[&str]) -> Output {
    let mut command = Command::new(crate::support::binary());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BRADLEY_")) {
        command.env_remove(name);
    }
    command.args(args).output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Starts a server that must not start, and checks its error. `args` may replace the addresses.
fn refused(dir: &Path, args: &[&str], code: i32, wanted: &[&str]) -> String {
    let model = golden("models/llama");
    let data = dir.join("data");
    let (a, b) = (free_port(), free_port());
    let ports = [format!("127.0.0.1:{a}"), format!("127.0.0.1:{b}")];
    let mut all = vec!["serve", "--models", model.to_str().unwrap()];
    all.extend(["--data-dir", data.to_str().unwrap()]);
    for (flag, address) in [("--listen", &ports[0]), ("--http-listen", &ports[1])] {
        if !args.contains(&flag) {
            all.extend([flag, address]);
        }
    }
    all.extend(args);
    let out = bradley(&all);
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    for part in wanted {
        assert!(said.contains(part), "{args:?} lacks {part:?}: {said}");
    }
    said
}

#[test]
fn a_server_that_cannot_start_names_the_setting_and_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let holders = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [taken, held] = holders
        .each_ref()
        .map(|l| l.local_addr().unwrap().to_string());
    let words = ["listen: cannot listen on", "another port with --listen"];
    refused(dir, &["--listen", &taken], 1, &words);
    let words = ["http_listen: cannot listen on", "with --http-listen"];
    refused(dir, &["--http-listen", &held], 1, &words);
    drop(holders);
    let same = format!("127.0.0.1:{}", free_port());
    let ports = ["--listen", &same, "--http-listen", &same];
    let words = format!("--http-listen is {same}, which is also the address of listen: name");
    refused(dir, &ports, 2, &[&words]);

    let words = ["--tls-cert is set, but --tls-key is not: TLS needs both"];
    refused(dir, &["--tls-cert", "x.pem"], 2, &words);
    let words = ["--tls-client-ca is set, but --tls-cert and --tls-key are not"];
    refused(dir, &["--tls-client-ca", "x.pem"], 2, &words);
    let files = [
        "--tls-cert",
        "/nowhere/x.pem",
        "--tls-key",
        "/nowhere/x.key",
    ];
    let words = ["error: tls_cert /nowhere/x.pem: No such"];
    let said = refused(dir, &files, 2, &words);
    assert!(
        !said.contains("model opened"),
        "a model was opened before the TLS files were checked: {said}"
    );
    let [cert, key] = ["a.pem", "b.key"].map(|name| dir.join(name));
    for (path, is_certificate) in [(&cert, true), (&key, false)] {
        // Each of the files belongs to another pair.
        let pair = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let text = match is_certificate {
            true => params.self_signed(&pair).unwrap().pem(),
            false => pair.serialize_pem(),
        };
        std::fs::write(path, text).unwrap();
    }
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let words = [
        "error: tls_key ",
        "b.key: it is not the key of the certificate in",
    ];
    refused(dir, &["--tls-cert", cert, "--tls-key", key], 2, &words);
    let words = ["tls_key ", "a.pem: it holds no PEM private key"];
    refused(dir, &["--tls-cert", cert, "--tls-key", cert], 2, &words);

    let words = ["MiB are needed, 0 MiB are allowed"];
    let said = refused(dir, &["--memory-limit", "1KB"], 1, &words);
    assert!(!said.contains("about 0 MiB"), "{said}");

    let words = ["audit_log /nowhere/a.log: No such file"];
    refused(dir, &["--audit-log", "/nowhere/a.log"], 1, &words);
    let words = ["--token-file has no effect while auth is off"];
    refused(dir, &["--token-file", "t.yaml"], 2, &words);

    let config = dir.join("bradley.toml");
    let config = ["--config", config.to_str().unwrap()];
    std::fs::write(config[1], "lease = 20\n\nmemory_limit = 4GiB\n").unwrap();
    refused(dir, &config, 2, &["is not TOML in line 3: "]);
    std::fs::write(config[1], "certificate = 'x'\n").unwrap();
    let words = ["certificate is not a setting: `bradley serve --help` lists them"];
    refused(dir, &config, 2, &words);

    let closed = free_port();
    let url = format!("postgres://bradley:secret@127.0.0.1:{closed}/bradley");
    let store = format!("file://{}", dir.join("store").display());
    let flags = ["--database-url", &url, "--artifact-url", &store];
    let place = format!("the database of database_url at 127.0.0.1:{closed} cannot be opened: it");
    let said = refused(dir, &flags, 1, &[&place, "did not answer within"]);
    assert!(!said.contains("secret"), "{said}");
    let data = dir.join("other");
    let list = ["tokens", "list", "--database-url", &url, "--data-dir"];
    let out = bradley(&[&list[..], &[data.to_str().unwrap()]].concat());
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&place.replace("database_url", "--database-url")),
        "{said}"
    );
}

#[test]
fn a_data_directory_that_cannot_be_used_is_named_before_the_models_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/llama");
    let file = dir.path().join("afile");
    std::fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let run = |command: &str, data: &str| {
        let ports = ["--listen", "127.0.0.1:0", "--http-listen", "off"];
        let models = ["--models", model.to_str().unwrap(), "--data-dir", data];
        let out = bradley(&[&[command][..], &ports, &models].concat());
        assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
        (stderr(&out), String::from_utf8(out.stdout).unwrap())
    };
    // Nobody can create a file in /proc, not even root.
    for (data, wanted) in [
        (file, " is a file: name a folder with --data-dir"),
        ("/proc", "name another folder with --data-dir"),
        ("/proc/new", " cannot be created: "),
    ] {
        let (said, _) = run("serve", data);
        let named = said.contains(&format!("error: data_dir {data}"));
        assert!(named && said.contains(wanted), "{said}");
        assert!(!said.contains("model opened"), "{said}");
    }
    let (_, said) = run("doctor", file);
    let wanted = format!("failed   data_dir {file}: is a file: name a folder");
    assert!(said.contains(&wanted), "{said}");
    assert!(said.contains("warning  database: is not made"), "{said}");
}

#[test]
fn commands_for_tokens_make_no_database_by_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("mistyped");
    let data = ["--data-dir", folder.to_str().unwrap()];
    for command in [&["tokens", "list"][..], &["tokens", "revoke", "x"][..]] {
        let out = bradley(&[command, &data[..]].concat());
        assert_eq!(out.status.code(), Some(2));
        assert!(
            stderr(&out).contains("has no bradley.db"),
            "{}",
            stderr(&out)
        );
        assert!(!folder.exists());
    }
    let create = [&["tokens", "create", "--owner", "a"][..], &data[..]].concat();
    let out = bradley(&create);
    assert!(out.status.success() && stderr(&out).contains("had no database, so one was made"));
    let out = bradley(&create);
    assert!(
        out.status.success() && stderr(&out).is_empty(),
        "{}",
        stderr(&out)
    );

    let out = bradley(&["tokens", "hash", "--owner", "oidc:x", "--generate"]);
    assert_eq!(out.status.code(), Some(2));
    let said = stderr(&out);
    assert!(
        said.contains("--owner: is \"oidc:x\"") && !said.contains("token:"),
        "{said}"
    );
}

#[test]
fn doctor_asks_the_server_of_its_settings() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let model = golden("models/llama");
    let doctor = |listen: &str| {
        let data = server.data_dir.to_str().unwrap();
        let mut args = vec!["doctor", "--models", model.to_str().unwrap()];
        args.extend([
            "--data-dir",
            data,
            "--listen",
            listen,
            "--http-listen",
            "off",
        ]);
        let out = bradley(&args);
        assert!(out.status.success(), "{}", stderr(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    let said = doctor(server.address.trim_start_matches("http://"));
    let wanted = format!("ok       server {}: serves models/", server.address);
    assert!(said.contains(&wanted), "{said}");
    let free = format!("127.0.0.1:{}", free_port());
    let said = doctor(&free);
    assert!(
        said.contains(&format!("server http://{free}: no server answers there")),
        "{said}"
    );
    let tokens = [
        "doctor",
        "--auth",
        "tokens",
        "--token-file",
        "/nowhere/t.yaml",
    ];
    let out = bradley(&tokens);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    let said = String::from_utf8(out.stdout).unwrap();
    let wanted = "failed   tokens: token_file /nowhere/t.yaml: No such file";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn doctor_asks_the_server_that_is_named_even_if_its_address_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/llama");
    let own = format!("127.0.0.1:{}", free_port());
    let named = "http://127.0.0.1:50051";
    let doctor = |flags: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new(crate::support::binary());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BRADLEY_")) {
            command.env_remove(name);
        }
        let out = command
            .args(["doctor", "--http-listen", "off", "--listen", &own])
            .args(["--models", model.to_str().unwrap(), "--data-dir"])
            .arg(dir.path())
            .args(flags)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        // A server may or may not answer at the default address.
        String::from_utf8(out.stdout).unwrap()
    };
    for said in [
        doctor(&["--server", named], &[]),
        doctor(&[], &[("BRADLEY_SERVER", named)]),
    ] {
        assert!(said.contains(&format!(" server {named}: ")), "{said}");
        assert!(!said.contains(&format!(" server http://{own}: ")), "{said}");
        assert!(!said.contains("no server answers there"), "{said}");
    }
    let said = doctor(&[], &[]);
    assert!(
        said.contains(&format!("ok       server http://{own}: ")),
        "{said}"
    );
}

#[test]
fn doctor_makes_the_checks_that_the_usable_settings_allow() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/llama");
    let listen = format!("127.0.0.1:{}", free_port());
    let config = dir.path().join("bradley.toml");
    let text = format!(
        "modles = \"x\"\nbatch_tokens = 0\nlisten = {listen:?}\nhttp_listen = \"off\"\n\
         models = {:?}\ndata_dir = {:?}\nauth = \"tokens\"\n\
         token_file = \"/nowhere/t.yaml\"\n",
        model.to_str().unwrap(),
        dir.path().join("data").to_str().unwrap()
    );
    std::fs::write(&config, text).unwrap();
    let doctor = |more: &[&str]| {
        let args = ["doctor", "--config", config.to_str().unwrap()];
        let out = bradley(&[&args[..], more].concat());
        assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    let said = doctor(&[]);
    for wanted in [
        "bradley.toml: modles: is not a setting",
        "bradley.toml: batch_tokens: is \"0\"",
        "ok       model llama: ",
        " data_dir ",
        " free on its volume",
        "failed   tokens: token_file /nowhere/t.yaml: No such file",
        &format!("ok       listen {listen}: is free"),
        &format!("ok       server http://{listen}: no server answers there"),
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert!(!said.contains("not checked"), "{said}");

    let said = doctor(&["--listen", "127.0.0.1:0"]);
    assert!(said.contains("ok       server: is not asked"), "{said}");
    assert!(!said.contains("not checked"), "{said}");

    let said = doctor(&["--http-listen", &listen]);
    let wanted = format!("failed   --http-listen: is {listen}, which is also the address of");
    assert!(said.contains(&wanted), "{said}");
    let wanted = "warning  not checked: http_listen: ";
    assert!(said.contains(wanted), "{said}");

    let said = doctor(&["--data-dir", "", "--listen", "nowhere"]);
    let wanted = "warning  not checked: data_dir, database, listen, running server: ";
    assert!(said.contains(wanted), "{said}");
    assert!(said.contains("ok       model llama: "), "{said}");
    assert!(!said.contains("no server answers"), "{said}");
}

#[test]
fn doctor_checks_the_audit_log_the_issuer_and_the_collector() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden("models/llama");
    let data = dir.path().join("data");
    let listen = format!("127.0.0.1:{}", free_port());
    let closed = format!("http://127.0.0.1:{}", free_port());
    let doctor = |more: &[&str]| {
        let args = [
            "doctor",
            "--models",
            model.to_str().unwrap(),
            "--data-dir",
            data.to_str().unwrap(),
            "--listen",
            &listen,
            "--http-listen",
            "off",
        ];
        let out = bradley(&[&args[..], more].concat());
        let said = String::from_utf8(out.stdout).unwrap();
        (out.status.code(), said)
    };
    let (code, said) = doctor(&["--audit-log", "/nowhere/a.jsonl"]);
    assert_eq!(code, Some(1), "{said}");
    let wanted = "failed   audit_log /nowhere/a.jsonl: No such file";
    assert!(said.contains(wanted), "{said}");

    let log = dir.path().join("a.jsonl");
    let (code, said) = doctor(&["--audit-log", log.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("a.jsonl: is created"), "{said}");
    assert!(!log.exists(), "doctor made the audit log");
    std::fs::write(&log, "").unwrap();
    let (_, said) = doctor(&["--audit-log", log.to_str().unwrap()]);
    assert!(said.contains("a.jsonl: can be written"), "{said}");

    let (code, said) = doctor(&["--otlp-endpoint", &closed]);
    assert_eq!(code, Some(0), "{said}");
    let wanted = format!("warning  otlp_endpoint {closed}: cannot be reached");
    assert!(said.contains(&wanted), "{said}");
    let (code, said) = doctor(&[
        "--auth",
        "tokens",
        "--oidc-issuer",
        &closed,
        "--oidc-audience",
        "bradley",
        "--oidc-roles",
        "score=*",
    ]);
    assert_eq!(code, Some(1), "{said}");
    let wanted = format!(
        "failed   oidc_issuer {closed}: the keys of the OIDC issuer cannot be fetched: {closed}/"
    );
    assert!(said.contains(&wanted), "{said}");
}

#[test]
fn refused_calls_speak_of_flags() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let out = bradley(&["usage", "--server", &server.address, "--from", "2999-01-01"]);
    assert_eq!(out.status.code(), Some(2));
    let said = stderr(&out);
    assert!(
        said.contains("--from is 2999-01-01, after the last day, "),
        "{said}"
    );
    drop(server);

    let dir = tempfile::tempdir().unwrap();
    let models = format!("tiny={}", golden("models/llama").display());
    let server = Server::start_with(dir.path(), &models, &["--auth", "tokens"]);
    assert!(server.has_logged("there is no token yet"));
    let out = bradley(&["jobs", "list", "--server", &server.address]);
    assert_eq!(out.status.code(), Some(1));
    let said = stderr(&out);
    assert!(
        said.contains("--token or the variable BRADLEY_TOKEN"),
        "{said}"
    );
}
