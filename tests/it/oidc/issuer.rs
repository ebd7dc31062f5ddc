//! An issuer in the test process: a discovery document and keys over HTTP, and signed tokens.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::CertificateParams;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256,
    RSA_PSS_SHA256, RsaKeyPair,
};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Returns the time in seconds since 1970.
pub fn now() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.unwrap().as_secs()
}

/// Encodes bytes as in JWTs.
pub fn base64(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

enum Pair {
    Rsa(Box<RsaKeyPair>),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

/// A key that signs tokens.
pub struct Key {
    /// Id in the key set and in the headers of tokens.
    pub id: Option<String>,
    pair: Pair,
}

impl Key {
    /// Returns the RSA key of these tests. ring makes no such keys, so OpenSSL has made this one.
    pub fn rsa(id: &str) -> Key {
        let pair = RsaKeyPair::from_pkcs8(include_bytes!("rsa.pk8")).unwrap();
        Key {
            id: Some(id.to_owned()),
            pair: Pair::Rsa(Box::new(pair)),
        }
    }

    /// Makes a key on the curve P-256.
    pub fn ec(id: &str) -> Key {
        let random = SystemRandom::new();
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random);
        let pair = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            made.unwrap().as_ref(),
            &random,
        );
        Key {
            id: Some(id.to_owned()),
            pair: Pair::Ec(pair.unwrap()),
        }
    }

    /// Makes an Ed25519 key.
    pub fn ed(id: &str) -> Key {
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Key {
            id: Some(id.to_owned()),
            pair: Pair::Ed(Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap()),
        }
    }

    /// Returns the public key: the modulus of RSA, or the point.
    pub fn public_bytes(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Rsa(pair) => {
                let public: ring::rsa::PublicKeyComponents<Vec<u8>> = pair.public().into();
                public.n
            }
            Pair::Ec(pair) => pair.public_key().as_ref().to_vec(),
            Pair::Ed(pair) => pair.public_key().as_ref().to_vec(),
        }
    }

    /// Returns the entry of the key set.
    pub fn public(&self) -> Value {
        let bytes = self.public_bytes();
        let mut key = match &self.pair {
            Pair::Rsa(pair) => {
                let public: ring::rsa::PublicKeyComponents<Vec<u8>> = pair.public().into();
                json!({"kty": "RSA", "n": base64(&public.n), "e": base64(&public.e)})
            }
            Pair::Ec(_) => json!({"kty": "EC", "crv": "P-256", "x": base64(&bytes[1..33]),
                "y": base64(&bytes[33..])}),
            Pair::Ed(_) => json!({"kty": "OKP", "crv": "Ed25519", "x": base64(&bytes)}),
        };
        key["use"] = "sig".into();
        if let Some(id) = &self.id {
            key["kid"] = id.as_str().into();
        }
        key
    }

    /// Returns a token with these claims.
    pub fn sign(&self, claims: &Value) -> String {
        self.sign_with(json!({}), claims)
    }

    /// Returns a token with these claims and changes of the header.
    pub fn sign_with(&self, changes: Value, claims: &Value) -> String {
        let algorithm = match &self.pair {
            Pair::Rsa(_) => "RS256",
            Pair::Ec(_) => "ES256",
            Pair::Ed(_) => "EdDSA",
        };
        let mut header = json!({"alg": algorithm, "typ": "JWT"});
        if let Some(id) = &self.id {
            header["kid"] = id.as_str().into();
        }
        for (name, value) in changes.as_object().unwrap() {
            header[name] = value.clone();
        }
        let message = message(&header, claims);
        let random = SystemRandom::new();
        let signature = match &self.pair {
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                let padding: &dyn ring::signature::RsaEncoding = match &header["alg"] {
                    alg if alg == "PS256" => &RSA_PSS_SHA256,
                    _ => &RSA_PKCS1_SHA256,
                };
                pair.sign(padding, &random, message.as_bytes(), &mut signature)
                    .unwrap();
                signature
            }
            Pair::Ec(pair) => pair
                .sign(&random, message.as_bytes())
                .unwrap()
                .as_ref()
                .to_vec(),
            Pair::Ed(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
        };
        format!("{message}.{}", base64(&signature))
    }
}

fn message(header: &Value, claims: &Value) -> String {
    format!(
        "{}.{}",
        base64(header.to_string().as_bytes()),
        base64(claims.to_string().as_bytes())
    )
}

/// Returns a token that is signed with a shared secret.
pub fn hmac(secret: &[u8], header: Value, claims: &Value) -> String {
    let message = message(&header, claims);
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
    let tag = ring::hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", base64(tag.as_ref()))
}

#[derive(Default)]
struct Published {
    document: Value,
    keys: Value,
    fetches: AtomicU64,
}

/// A running issuer; it stops when dropped.
pub struct Issuer {
    /// Its URL, which is also its name.
    pub url: String,
    published: Arc<Mutex<Published>>,
    serving: JoinHandle<()>,
}

impl Issuer {
    /// Starts an issuer that publishes these keys.
    pub async fn start(keys: &[&Key]) -> Issuer {
        Self::start_on(0, keys).await
    }

    /// Starts it on a port.
    pub async fn start_on(port: u16, keys: &[&Key]) -> Issuer {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let published = Arc::new(Mutex::new(Published::default()));
        let router = router(&published);
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self::publishing(url, published, serving, keys)
    }

    /// Starts it with TLS, and writes the certificate of its authority to a file.
    pub async fn start_with_tls(keys: &[&Key], ca: &Path) -> Issuer {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["localhost".to_owned()])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        std::fs::write(ca, certificate.pem()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!(
            "https://localhost:{}",
            listener.local_addr().unwrap().port()
        );
        let published = Arc::new(Mutex::new(Published::default()));
        let router = router(&published);
        let listener = Tls(listener, TlsAcceptor::from(Arc::new(config)));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self::publishing(url, published, serving, keys)
    }

    fn publishing(
        url: String,
        published: Arc<Mutex<Published>>,
        serving: JoinHandle<()>,
        keys: &[&Key],
    ) -> Issuer {
        let issuer = Issuer {
            url,
            published,
            serving,
        };
        issuer.describe(json!({
            "issuer": issuer.url,
            "jwks_uri": format!("{}/jwks", issuer.url),
            "authorization_endpoint": format!("{}/auth", issuer.url),
        }));
        issuer.publish(keys);
        issuer
    }

    /// Replaces the published keys.
    pub fn publish(&self, keys: &[&Key]) {
        let keys: Vec<Value> = keys.iter().map(|k| k.public()).collect();
        self.published.lock().unwrap().keys = json!({ "keys": keys });
    }

    /// Replaces the discovery document.
    pub fn describe(&self, document: Value) {
        self.published.lock().unwrap().document = document;
    }

    /// Returns the number of times that the keys were fetched.
    pub fn fetches(&self) -> u64 {
        let published = self.published.lock().unwrap();
        published.fetches.load(Ordering::Relaxed)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn router(published: &Arc<Mutex<Published>>) -> Router {
    let (document, keys) = (published.clone(), published.clone());
    // Connections end with each answer, so that none outlives the issuer.
    let answer = |body: String| {
        Response::builder()
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .body(Body::from(body))
            .unwrap()
    };
    Router::new()
        .route(
            "/.well-known/openid-configuration",
            get(move || async move { answer(document.lock().unwrap().document.to_string()) }),
        )
        .route(
            "/jwks",
            get(move || async move {
                let published = keys.lock().unwrap();
                published.fetches.fetch_add(1, Ordering::Relaxed);
                answer(published.keys.to_string())
            }),
        )
        .route(
            "/moved",
            get(|| async { (StatusCode::FOUND, [(header::LOCATION, "/jwks")]) }),
        )
        .route("/endless", get(|| async { " ".repeat(16 << 20) }))
}

struct Tls(TcpListener, TlsAcceptor);

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            if let Ok((connection, address)) = self.0.accept().await
                // A client that does not trust the certificate ends the handshake.
                && let Ok(stream) = self.1.accept(connection).await
            {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
