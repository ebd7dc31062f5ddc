//! Tokens of an OpenID Connect issuer, against an issuer that speaks HTTP and signs with real keys.

mod issuer;
mod provider;

use std::path::Path;
use std::time::Duration;

use bradley::rpc::client::{Client, Status, Target};
use bradley::rpc::pb;
use serde_json::{Value, json};
use tonic::Code;

use self::issuer::{Issuer, Key, base64, now};
use crate::server::{
    Server, create, create_token, free_port, job, reason, score, submit, try_get, upload,
};
use crate::support::golden;
use crate::wait::{holds_for, until, until_ok};

/// Starts a server that accepts the issuer's tokens; `flags` are added.
fn serve(dir: &Path, issuer: &str, flags: &[&str]) -> Server {
    let audit = dir.join("audit.jsonl");
    let mut all = vec![
        "--auth",
        "tokens",
        "--audit-log",
        audit.to_str().unwrap(),
        "--oidc-issuer",
        issuer,
        "--oidc-audience",
        "bradley,https://bradley.example.com",
        "--oidc-roles-claim",
        "groups",
        "--oidc-roles",
        "submit=ml-team,score=ml-team,score=raters,admin=ml-ops",
    ];
    all.extend_from_slice(flags);
    Server::start_with(
        dir,
        &format!("tiny={}", golden("models/llama").display()),
        &all,
    )
}

/// Calls a method for which every role suffices.
async fn call(server: &Server, token: &str) -> Result<(), Status> {
    let client = server.client_with(token).await;
    client
        .models()
        .list_models(pb::ListModelsRequest {})
        .await
        .map(|_| ())
}

/// Waits until a token is accepted.
async fn until_accepted(server: &Server, token: &str) {
    let limit = Duration::from_secs(30);
    until_ok("the acceptance of a token", limit, async || {
        call(server, token).await.map_err(|e| e.to_string())
    })
    .await;
}

/// Returns the claims of a valid token, with changes; `null` removes a claim.
fn claims(issuer: &str, changes: Value) -> Value {
    let mut claims = json!({
        "iss": issuer,
        "aud": "bradley",
        "sub": "alice",
        "groups": ["staff", "ml-team"],
        "iat": now(),
        "exp": now() + 600,
    });
    let all = claims.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            all.remove(name);
        } else {
            all.insert(name.clone(), value.clone());
        }
    }
    claims
}

/// Returns the value of a metric's series, e.g. `name{label="x"}`.
fn metric(server: &Server, series: &str) -> f64 {
    let metrics = server.metrics();
    let line = metrics
        .lines()
        .find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tokens_that_the_issuer_made_for_this_server_are_accepted() {
    let (rsa, ec, ed) = (Key::rsa("rsa"), Key::ec("ec"), Key::ed("ed"));
    let issuer = Issuer::start(&[&rsa, &ec, &ed]).await;
    let url = issuer.url.as_str();
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), url, &[]);
    let good = |changes: Value| claims(url, changes);

    for (algorithm, key) in [
        ("RS256", &rsa),
        ("PS256", &rsa),
        ("ES256", &ec),
        ("EdDSA", &ed),
    ] {
        let token = key.sign_with(json!({"alg": algorithm}), &good(json!({})));
        until_accepted(&server, &token).await;
        // Every other text that could be taken for this token is refused.
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let (header, payload) = signed.split_once('.').unwrap();
        let forged = base64(good(json!({"sub": "bob"})).to_string().as_bytes());
        let zeros = base64(&[0; 64]);
        for text in [
            format!("{header}.{forged}.{signature}"),
            format!("{header}.{payload}.{zeros}"),
            format!("{header}.{payload}."),
            format!("{header}.{payload}"),
            format!("{header}.{payload}.{signature}.{signature}"),
            format!("{token}A"),
            format!(".{token}"),
        ] {
            let refused = call(&server, &text).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated, "{algorithm} {text}");
        }
    }
    for accepted in [
        json!({"aud": ["other", "bradley"]}),
        json!({"aud": ["https://bradley.example.com"]}),
        json!({"exp": now() - 10}),
        json!({"nbf": now() + 10}),
        json!({"nbf": now() - 10, "exp": now() as f64 + 600.5}),
    ] {
        let answer = call(&server, &ec.sign(&good(accepted.clone()))).await;
        assert!(answer.is_ok(), "{accepted}: {answer:?}");
    }
    for kind in ["JWT", "at+jwt", "application/at+JWT"] {
        let token = ec.sign_with(json!({"typ": kind}), &good(json!({})));
        assert!(call(&server, &token).await.is_ok(), "{kind}");
    }

    let stranger = Key::ec("stranger");
    let mut impostor = Key::ec("ec");
    let same_id = impostor.sign(&good(json!({})));
    impostor.id = None;
    // The algorithm confusion: the public key, which everyone knows, as the secret of an HMAC.
    let confusion = |key: &[u8], id: &str| {
        let header = json!({"alg": "HS256", "typ": "JWT", "kid": id});
        issuer::hmac(key, header, &good(json!({})))
    };
    let unsigned = |algorithm: &str| {
        let header = base64(
            json!({"alg": algorithm, "kid": "ec"})
                .to_string()
                .as_bytes(),
        );
        format!(
            "{header}.{}.",
            base64(good(json!({})).to_string().as_bytes())
        )
    };
    let past = now() - 3600;
    for (what, token, says, label) in [
        (
            "another audience",
            ec.sign(&good(json!({"aud": "other"}))),
            "another audience",
            "audience",
        ),
        (
            "a part of the audience's name",
            ec.sign(&good(json!({"aud": ["bradley2", "brad"]}))),
            "another audience",
            "audience",
        ),
        (
            "no audience",
            ec.sign(&good(json!({"aud": null}))),
            "\"aud\"",
            "claims",
        ),
        (
            "another issuer",
            ec.sign(&good(json!({"iss": "https://id.example.com"}))),
            "another issuer",
            "issuer",
        ),
        (
            "the issuer with a slash",
            ec.sign(&good(json!({"iss": format!("{url}/")}))),
            "another issuer",
            "issuer",
        ),
        (
            "a list of issuers",
            ec.sign(&good(json!({"iss": [url, "x"]}))),
            "another issuer",
            "issuer",
        ),
        (
            "an expired token",
            ec.sign(&good(json!({"exp": past}))),
            "has expired",
            "expired",
        ),
        (
            "no expiry",
            ec.sign(&good(json!({"exp": null}))),
            "\"exp\"",
            "claims",
        ),
        (
            "an expiry that is a text",
            ec.sign(&good(json!({"exp": "2099-01-01"}))),
            "\"exp\"",
            "claims",
        ),
        (
            "a token of tomorrow",
            ec.sign(&good(json!({"nbf": now() + 3600}))),
            "not valid yet",
            "not_yet_valid",
        ),
        (
            "no owner",
            ec.sign(&good(json!({"sub": null}))),
            "\"sub\"",
            "claims",
        ),
        (
            "an unknown key",
            stranger.sign(&good(json!({}))),
            "does not publish",
            "unknown_key",
        ),
        (
            "another key with the id of a known one",
            same_id,
            "wrong signature",
            "signature",
        ),
        (
            "another key without an id",
            impostor.sign(&good(json!({}))),
            "wrong signature",
            "signature",
        ),
        (
            "a key in the header",
            stranger.sign_with(
                json!({"jwk": stranger.public(), "kid": "stranger"}),
                &good(json!({})),
            ),
            "does not publish",
            "unknown_key",
        ),
        (
            "the id of another type of key",
            ec.sign_with(json!({"kid": "rsa"}), &good(json!({}))),
            "does not publish",
            "unknown_key",
        ),
        (
            "HS256 with the modulus of the RSA key",
            confusion(&rsa.public_bytes(), "rsa"),
            "is not signed with RS256",
            "algorithm",
        ),
        (
            "HS256 with the point of the EC key",
            confusion(&ec.public_bytes(), "ec"),
            "is not signed with RS256",
            "algorithm",
        ),
        (
            "HS256 with the key as it is published",
            confusion(rsa.public().to_string().as_bytes(), "rsa"),
            "is not signed with RS256",
            "algorithm",
        ),
        ("none", unsigned("none"), "is not a JWT", "malformed"),
        ("None", unsigned("None"), "is not a JWT", "malformed"),
        (
            "an algorithm that is not accepted",
            unsigned("RS512"),
            "is not signed with RS256",
            "algorithm",
        ),
        (
            "a logout token",
            ec.sign_with(json!({"typ": "logout+jwt"}), &good(json!({}))),
            "is not an access token",
            "malformed",
        ),
        (
            "an extension that must be understood",
            ec.sign_with(json!({"crit": ["exp"]}), &good(json!({}))),
            "is not a JWT",
            "malformed",
        ),
        (
            "an enormous token",
            ec.sign(&good(json!({"more": "x".repeat(10_000)}))),
            "bytes",
            "malformed",
        ),
        ("dots", "..".to_owned(), "is not a JWT", "malformed"),
        ("words", "a.b.c".to_owned(), "is not a JWT", "malformed"),
    ] {
        let series = format!("bradley_oidc_refused_total{{reason=\"{label}\"}}");
        let before = metric(&server, &series);
        let refused = call(&server, &token).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{what}: {refused:?}");
        assert_eq!(reason(&refused), "UNAUTHENTICATED", "{what}");
        assert!(refused.message().contains(says), "{what}: {refused:?}");
        assert_eq!(metric(&server, &series), before + 1.0, "{what}");
    }

    // The audit log has the reasons, of at most 20 refusals a second, and no token.
    let log = || std::fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    let expired = ec.sign(&good(json!({"exp": past})));
    let logged = async || {
        let _ = call(&server, &expired).await;
        log().contains("the bearer token has expired")
    };
    until(
        "the reason in the audit log",
        Duration::from_secs(30),
        logged,
    )
    .await;
    assert!(log().contains("keys of the issuer"), "{}", log());
    assert!(!log().contains("eyJ"), "{}", log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuers_owners_and_roles_are_apart_from_our_own() {
    let key = Key::ec("k");
    let issuer = Issuer::start(&[&key]).await;
    let dir = tempfile::tempdir().unwrap();
    let own = create_token(dir.path(), "team-a", "submit,score");
    let server = serve(dir.path(), &issuer.url, &[]);
    let token = |sub: &str, groups: &[&str]| {
        key.sign(&claims(&issuer.url, json!({"sub": sub, "groups": groups})))
    };
    until_accepted(&server, &token("team-a", &["ml-team"])).await;

    let ours = server.client_with(&own).await;
    let dataset = upload(&ours, "pairs.jsonl").await;
    let stolen = submit(&ours, job(&dataset.name, 1)).await;
    for sub in ["team-a", "oidc:team-a"] {
        let theirs = server.client_with(&token(sub, &["ml-team"])).await;
        let refused = try_get(&theirs, &stolen).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{sub}");
        let refused = create(&theirs, job(&dataset.name, 1)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{sub}");
        let listed = theirs
            .training()
            .list_training_jobs(pb::ListTrainingJobsRequest::default())
            .await
            .unwrap()
            .into_inner();
        assert!(listed.training_jobs.is_empty(), "{sub}");
    }

    let alice = server.client_with(&token("alice", &["ml-team"])).await;
    let dataset = upload(&alice, "pairs.jsonl").await;
    let name = submit(&alice, job(&dataset.name, 1)).await;
    assert_eq!(try_get(&alice, &name).await.unwrap().owner, "oidc:alice");
    for other in [
        &ours,
        &server.client_with(&token("Alice", &["ml-team"])).await,
        &server.client_with(&token("bob", &["ml-team"])).await,
    ] {
        let refused = try_get(other, &name).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }

    let rater = server.client_with(&token("carol", &["raters"])).await;
    assert!(
        !score(&rater, "models/tiny", crate::server::pairs())
            .await
            .results
            .is_empty()
    );
    let refused = try_get(&rater, &name).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("submit"), "{refused:?}");
    let admin = server.client_with(&token("dan", &["ml-ops"])).await;
    assert!(try_get(&admin, &name).await.is_ok() && try_get(&admin, &stolen).await.is_ok());

    // Whoever has no role may do nothing, not even what needs no particular role.
    for groups in [
        &[][..],
        &["admin"],
        &["submit", "score"],
        &["*"],
        &["ML-OPS"],
    ] {
        let refused = call(&server, &token("eve", groups)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{groups:?}");
        assert!(refused.message().contains("gives no role"), "{refused:?}");
    }
    let log = std::fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    assert!(log.contains("\"owner\":\"oidc:alice\"") && log.contains("gives no role"));
}

#[tokio::test(flavor = "multi_thread")]
async fn new_keys_are_accepted_at_once_and_withdrawn_ones_are_soon_refused() {
    let (old, new) = (Key::ec("2026"), Key::ed("2027"));
    let issuer = Issuer::start(&[&old]).await;
    let dir = tempfile::tempdir().unwrap();
    // Only an unknown key can cause a fetch.
    let server = serve(dir.path(), &issuer.url, &["--oidc-refresh", "3600"]);
    let of = |key: &Key, sub: &str| key.sign(&claims(&issuer.url, json!({"sub": sub})));
    until_accepted(&server, &of(&old, "a")).await;

    issuer.publish(&[&old, &new]);
    assert!(
        call(&server, &of(&new, "a")).await.is_ok(),
        "a new key is not accepted at once"
    );
    assert!(call(&server, &of(&old, "b")).await.is_ok());

    // Callers with unknown keys cannot make the server ask the issuer all the time.
    let before = issuer.fetches();
    let strangers: Vec<String> = (0..60)
        .map(|i| of(&Key::ec(&format!("stranger-{i}")), "a"))
        .collect();
    let start = std::time::Instant::now();
    let mut all = tokio::task::JoinSet::new();
    for token in strangers {
        let target = Target {
            token: Some(token),
            ..Target::plain(&server.address)
        };
        all.spawn(async move {
            let client = Client::connect(&target, Duration::from_secs(10)).await;
            let client = client.unwrap();
            client.models().list_models(pb::ListModelsRequest {}).await
        });
    }
    while let Some(answer) = all.join_next().await {
        assert_eq!(answer.unwrap().unwrap_err().code(), Code::Unauthenticated);
    }
    let fetches = issuer.fetches() - before;
    // The server waits at least 2 seconds between two fetches.
    let allowed = 2 + start.elapsed().as_secs() / 2;
    assert!(
        fetches <= allowed,
        "{fetches} fetches, {allowed} are allowed"
    );

    // A key that the issuer withdraws is refused after the next fetch.
    issuer.publish(&[&new]);
    let refused = async || {
        let _ = call(&server, &of(&Key::ec("another"), "a")).await;
        call(&server, &of(&old, "c")).await.is_err()
    };
    until(
        "the refusal of an old key",
        Duration::from_secs(30),
        refused,
    )
    .await;
    assert!(call(&server, &of(&new, "b")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_issuer_is_away_the_last_keys_are_used_for_a_while() {
    let key = Key::ec("k");
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let dir = tempfile::tempdir().unwrap();
    let own = create_token(dir.path(), "team-a", "score");
    let flags = ["--oidc-refresh", "1", "--oidc-max-key-age", "8"];
    // The issuer is away when the server starts.
    let server = serve(dir.path(), &url, &flags);
    let token = |sub: &str| key.sign(&claims(&url, json!({"sub": sub})));
    let refused = call(&server, &token("a")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert_eq!(reason(&refused), "ISSUER_UNAVAILABLE");
    assert!(!refused.message().contains("127.0.0.1"), "{refused:?}");
    assert!(
        call(&server, &own).await.is_ok(),
        "our own tokens are refused without the issuer"
    );
    assert!(server.has_logged("the keys of the OIDC issuer cannot be fetched"));
    assert_eq!(metric(&server, "bradley_oidc_up"), 0.0);

    let issuer = Issuer::start_on(port, &[&key]).await;
    until_accepted(&server, &token("b")).await;
    assert_eq!(metric(&server, "bradley_oidc_up"), 1.0);
    assert_eq!(metric(&server, "bradley_oidc_keys"), 1.0);

    // It goes away. For now its keys are known; a key that is not known cannot be looked up.
    drop(issuer);
    let limit = Duration::from_secs(30);
    until("a failed fetch", limit, async || {
        metric(&server, "bradley_oidc_up") == 0.0
    })
    .await;
    assert!(call(&server, &token("c")).await.is_ok());
    let stranger = Key::ec("x").sign(&claims(&url, json!({})));
    let refused = call(&server, &stranger).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let mut n = 0;
    until("the end of the keys", limit, async || {
        n += 1;
        let answer = call(&server, &token(&format!("d{n}"))).await;
        answer.is_err_and(|e| reason(&e) == "ISSUER_UNAVAILABLE")
    })
    .await;
    assert!(call(&server, &own).await.is_ok());

    let _issuer = Issuer::start_on(port, &[&key]).await;
    until_accepted(&server, &token("e")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_calls_end_with_their_token() {
    let key = Key::ec("k");
    let issuer = Issuer::start(&[&key]).await;
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &issuer.url, &[]);
    let lasting = key.sign(&claims(&issuer.url, json!({})));
    until_accepted(&server, &lasting).await;
    let lasting = server.client_with(&lasting).await;
    let dataset = upload(&lasting, "pairs.jsonl").await;
    let name = submit(&lasting, job(&dataset.name, 100_000)).await;
    // For 30 seconds after its expiry a token is still accepted.
    let ending = key.sign(&claims(&issuer.url, json!({"exp": now() - 22})));
    let request = pb::StreamTrainingEventsRequest {
        parent: name.clone(),
        after_sequence: 0,
        ..Default::default()
    };
    let mut open = server
        .client_with(&ending)
        .await
        .training()
        .stream_training_events(request)
        .await
        .unwrap()
        .into_inner();
    let ended = async {
        loop {
            match open.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(e) => return Some(e.code()),
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    assert_eq!(
        ended.expect("the stream does not end"),
        Some(Code::Unauthenticated)
    );
    let refused = call(&server, &ending).await.unwrap_err();
    assert!(refused.message().contains("has expired"), "{refused:?}");
    assert!(try_get(&lasting, &name).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_and_readiness_tell_that_the_issuer_answers() {
    let key = Key::ec("k");
    let issuer = Issuer::start(&[&key]).await;
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &issuer.url, &[]);
    let state = "[+] OIDC issuer: its keys are known (1)\n";
    until(
        "the line of readiness",
        Duration::from_secs(30),
        async || server.http_get("/readyz?verbose").contains(state),
    )
    .await;
    let mut doctor = std::process::Command::new(crate::support::binary());
    doctor
        .args(["doctor", "--auth", "tokens", "--oidc-issuer", &issuer.url])
        .args(["--oidc-audience", "bradley", "--oidc-roles", "score=*"])
        .args(["--otlp-endpoint", &server.address]);
    let ended = tokio::task::spawn_blocking(move || doctor.output()).await;
    let said = String::from_utf8(ended.unwrap().unwrap().stdout).unwrap();
    let wanted = format!(
        "ok       oidc_issuer {}: its keys can be fetched (1)",
        issuer.url
    );
    assert!(said.contains(&wanted), "{said}");
    assert!(said.contains(": accepts connections"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discovery_document_of_another_issuer_gives_no_keys() {
    let key = Key::ec("k");
    let issuer = Issuer::start(&[&key]).await;
    let localhost = issuer.url.replace("127.0.0.1", "localhost");
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &localhost, &[]);
    until("the warning", Duration::from_secs(30), async || {
        server.has_logged("set oidc_issuer to exactly this")
    })
    .await;
    let state = "[-] OIDC issuer: its keys cannot be fetched: its tokens cannot be checked\n";
    until(
        "the line of readiness",
        Duration::from_secs(30),
        async || {
            let verbose = server.http_get("/readyz?verbose");
            verbose.starts_with("HTTP/1.1 200") && verbose.contains(state)
        },
    )
    .await;
    let token = key.sign(&claims(&localhost, json!({})));
    let unavailable = async || {
        let answer = call(&server, &token).await;
        answer.is_err_and(|e| e.code() == Code::Unavailable)
    };
    holds_for("the refusal", Duration::from_secs(1), unavailable).await;
    drop(server);

    // A redirect is not followed, and keys of an unsafe place are not used.
    let (moved, endless) = (
        format!("{}/moved", issuer.url),
        format!("{}/endless", issuer.url),
    );
    for (document, why) in [
        (
            json!({"issuer": issuer.url, "jwks_uri": "http://keys.example.com/jwks"}),
            "which is not https",
        ),
        (
            json!({"issuer": issuer.url, "jwks_uri": moved}),
            "answers 302",
        ),
        (json!({"issuer": issuer.url}), "is not a discovery document"),
        (
            json!({"issuer": issuer.url, "jwks_uri": endless}),
            "answers more than",
        ),
    ] {
        issuer.describe(document.clone());
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path(), &issuer.url, &[]);
        let token = key.sign(&claims(&issuer.url, json!({})));
        let refused = call(&server, &token).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{document}");
        // Any other failure would refuse the call too, so the log must have the reason.
        until(why, Duration::from_secs(30), async || {
            server.has_logged(why)
        })
        .await;
    }
    // With the URL of the keys, the document is not needed.
    let dir = tempfile::tempdir().unwrap();
    let keys = format!("{}/jwks", issuer.url);
    let server = serve(dir.path(), &issuer.url, &["--oidc-jwks-url", &keys]);
    until_accepted(&server, &key.sign(&claims(&issuer.url, json!({})))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_with_a_private_authority_needs_its_certificate() {
    let key = Key::ec("k");
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    let issuer = Issuer::start_with_tls(&[&key], &ca).await;
    let token = key.sign(&claims(&issuer.url, json!({})));
    let data = dir.path().join("trusting");
    std::fs::create_dir(&data).unwrap();
    let server = serve(
        &data,
        &issuer.url,
        &["--oidc-ca-file", ca.to_str().unwrap()],
    );
    until_accepted(&server, &token).await;
    drop(server);
    let data = dir.path().join("other");
    std::fs::create_dir(&data).unwrap();
    let server = serve(&data, &issuer.url, &[]);
    let refused = call(&server, &token).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(server.has_logged("certificate"));
}
