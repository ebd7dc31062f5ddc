//! Real backends as child processes: PostgreSQL and an S3 server (moto), each on a port of its own.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::server::{Server, free_port};
use crate::support::needed;
use crate::wait::until_blocking;

/// Maximum time for a backend to start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Delay between two checks whether a proxy still holds its messages back.
const HOLD_INTERVAL: Duration = Duration::from_millis(5);

/// PostgreSQL with an empty database; it is stopped and removed on drop.
pub struct Postgres {
    bin: PathBuf,
    dir: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Postgres {
    /// Starts a server with the programs in the folder that BRADLEY_TEST_POSTGRES names.
    pub fn start() -> Self {
        let bin = PathBuf::from(needed("BRADLEY_TEST_POSTGRES"));
        let dir = tempfile::tempdir().unwrap();
        if is_root() {
            // PostgreSQL refuses to run as root.
            assert!(
                Command::new("chown")
                    .args(["postgres:"])
                    .arg(dir.path())
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let data = dir.path().join("data");
        let initialized = as_postgres(&bin.join("initdb"))
            .args([
                "--auth=trust",
                "--username=bradley",
                "--encoding=UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(&data)
            .stdout(Stdio::null())
            .status();
        assert!(initialized.unwrap().success());
        let mut postgres = Postgres {
            bin,
            dir,
            port: free_port(),
            child: None,
        };
        postgres.resume();
        postgres
    }

    /// Returns the database's URL.
    pub fn url(&self) -> String {
        format!("postgres://bradley@127.0.0.1:{}/postgres", self.port)
    }

    /// Runs SQL statements in one transaction and returns the rows, their columns separated by `|`.
    pub fn sql(&self, statements: &str) -> Vec<String> {
        let answer = Command::new(self.bin.join("psql"))
            .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align"])
            .args(["--set", "ON_ERROR_STOP=1", "--command", statements])
            .arg(self.url())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.status.success(), "{statements}: {said}");
        String::from_utf8(answer.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Kills it, as a crash would.
    pub fn crash(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let data = self.dir.path().join("data");
        let _ = as_postgres(&self.bin.join("pg_ctl"))
            .args(["stop", "-m", "immediate", "-D"])
            .arg(data)
            .stdout(Stdio::null())
            .status();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Stops its processes without ending them, until the returned value is dropped. Connections to
    /// it stay open.
    pub fn freeze(&self) -> FrozenPostgres {
        let server = self.child.as_ref().unwrap().id();
        let children = std::fs::read_to_string(format!("/proc/{server}/task/{server}/children"));
        let mut processes = vec![server];
        processes.extend(
            children
                .unwrap()
                .split_whitespace()
                .map(|pid| pid.parse::<u32>().unwrap()),
        );
        assert!(
            processes.len() > 1,
            "PostgreSQL has no process for a connection"
        );
        for process in &processes {
            signal(*process, libc::SIGSTOP);
        }
        FrozenPostgres(processes)
    }

    /// Starts it, or starts it again, and waits until it answers.
    pub fn resume(&mut self) {
        let child = as_postgres(&self.bin.join("postgres"))
            .arg("-D")
            .arg(self.dir.path().join("data"))
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-k"])
            .arg(self.dir.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        until_blocking("the start of PostgreSQL", START_LIMIT, || {
            let ready = Command::new(self.bin.join("pg_isready"))
                .args(["-h", "127.0.0.1", "-p", &self.port.to_string()])
                .output()
                .unwrap();
            ready.status.success()
        });
    }
}

/// A PostgreSQL server whose processes are stopped.
pub struct FrozenPostgres(Vec<u32>);

impl Drop for FrozenPostgres {
    fn drop(&mut self) {
        for process in &self.0 {
            // SAFETY: the server waits for its processes, and it was stopped with them.
            unsafe { libc::kill(*process as i32, libc::SIGCONT) };
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.crash();
    }
}

/// Backends that several servers share: PostgreSQL, and a folder as the artifact store.
pub struct Shared {
    postgres: Postgres,
    artifacts: tempfile::TempDir,
}

impl Shared {
    /// Starts the database.
    pub fn start() -> Self {
        Shared {
            postgres: Postgres::start(),
            artifacts: tempfile::tempdir().unwrap(),
        }
    }

    /// Starts a server on both backends, with a data folder of its own.
    pub fn replica(&self, data_dir: &Path, models: &str, flags: &[&str]) -> Server {
        let artifacts = format!("file://{}", self.artifacts.path().display());
        let shared = [
            "--database-url",
            &self.postgres.url(),
            "--artifact-url",
            &artifacts,
            "--lease",
            "6",
        ];
        Server::start_with(data_dir, models, &[&shared, flags].concat())
    }
}

/// An S3 server with the bucket `bradley`.
pub struct S3 {
    child: Child,
    port: u16,
}

impl S3 {
    /// Starts moto with the Python that BRADLEY_TEST_PYTHON names.
    pub fn start() -> Self {
        let python = needed("BRADLEY_TEST_PYTHON");
        let port = free_port();
        let child = Command::new(python)
            .args([
                "-m",
                "moto.server",
                "-H",
                "127.0.0.1",
                "-p",
                &port.to_string(),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let s3 = S3 { child, port };
        until_blocking("the start of moto", START_LIMIT, || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        until_blocking("the creation of the bucket", START_LIMIT, || {
            s3.request("PUT", "/bradley")
                .is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
        });
        s3
    }

    /// Returns its port on this machine.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the environment of a server that uses this S3.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        self.environment_at(self.port)
    }

    /// Returns the same environment for a server that uses this S3 through a proxy.
    pub fn environment_at(&self, port: u16) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{port}")),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
        ]
    }

    /// Freezes it: it answers nothing until [`S3::thaw`].
    pub fn freeze(&self) {
        signal(self.child.id(), libc::SIGSTOP);
    }

    /// Makes it answer again.
    pub fn thaw(&self) {
        signal(self.child.id(), libc::SIGCONT);
    }

    /// Returns the keys below a prefix.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let answer = self
            .request("GET", &format!("/bradley?list-type=2&prefix={prefix}"))
            .unwrap();
        answer
            .split("<Key>")
            .skip(1)
            .filter_map(|part| part.split("</Key>").next())
            .map(str::to_owned)
            .collect()
    }

    /// Removes an object behind the server's back.
    pub fn remove(&self, key: &str) {
        self.request("DELETE", &format!("/bradley/{key}")).unwrap();
    }

    fn request(&self, method: &str, path: &str) -> std::io::Result<String> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port))?;
        let head = "Authorization: AWS4-HMAC-SHA256 \
                    Credential=test/20260101/us-east-1/s3/aws4_request\r\nContent-Length: 0";
        write!(
            connection,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Fault that a [`Proxy`] causes on its connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// No fault.
    None,
    /// The proxy answers 503 itself.
    Error,
    /// The proxy waits before it passes anything on.
    Slow(Duration),
    /// The proxy closes connections, including open ones.
    Reset,
}

/// A TCP proxy in front of a server that can cause faults, and can hold everything back.
pub struct Proxy {
    port: u16,
    state: Arc<ProxyState>,
}

struct ProxyState {
    /// Number of accepted connections.
    connections: AtomicUsize,
    fault: Mutex<Fault>,
    /// While it returns true, nothing passes.
    holds: Mutex<Option<Condition>>,
}

type Condition = Box<dyn Fn() -> bool + Send>;

impl ProxyState {
    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap()
    }

    fn holds(&self) -> bool {
        let holds = self.holds.lock().unwrap();
        holds.as_ref().is_some_and(|holds| holds())
    }
}

impl Proxy {
    /// Starts a proxy for a port of this machine; its threads end with the process.
    pub fn start(backend: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = ProxyState {
            connections: AtomicUsize::new(0),
            fault: Mutex::new(Fault::None),
            holds: Mutex::new(None),
        };
        let proxy = Proxy {
            port: listener.local_addr().unwrap().port(),
            state: Arc::new(state),
        };
        let state = proxy.state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                state.connections.fetch_add(1, Ordering::Relaxed);
                let state = state.clone();
                std::thread::spawn(move || serve(client, backend, &state));
            }
        });
        proxy
    }

    /// Starts a proxy for the server with this URL.
    pub fn in_front_of(url: &str) -> Self {
        let (_, port) = url.rsplit_once(':').unwrap();
        Self::start(port.parse().unwrap())
    }

    /// Returns its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns its URL.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Returns the number of connections that it has accepted.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Causes this fault from now on.
    pub fn set(&self, fault: Fault) {
        *self.state.fault.lock().unwrap() = fault;
    }

    /// Lets nothing pass while `condition` returns true, until [`Proxy::release`]. The condition is
    /// checked before every message, so a test that waits for the same condition finds the client
    /// in the middle of its work, however late the test looks.
    pub fn hold_while(&self, condition: impl Fn() -> bool + Send + 'static) {
        *self.state.holds.lock().unwrap() = Some(Box::new(condition));
    }

    /// Lets everything pass again.
    pub fn release(&self) {
        *self.state.holds.lock().unwrap() = None;
    }
}

/// Connects a client with the backend, until one of them ends.
fn serve(mut client: TcpStream, backend: u16, state: &Arc<ProxyState>) {
    if state.fault() == Fault::Error {
        let _ = client.read(&mut [0; 65536]);
        let _ = client
            .write_all(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", backend)) else {
        return;
    };
    let (Ok(from_server), Ok(to_client)) = (server.try_clone(), client.try_clone()) else {
        return;
    };
    let shared = state.clone();
    let back = std::thread::spawn(move || pump(from_server, to_client, &shared));
    pump(client, server, state);
    let _ = back.join();
}

/// Passes bytes on until one side ends or the proxy causes a fault.
fn pump(mut from: TcpStream, mut to: TcpStream, state: &ProxyState) {
    let mut buffer = vec![0; 65536];
    loop {
        let read = from.read(&mut buffer);
        while state.holds() {
            std::thread::sleep(HOLD_INTERVAL);
        }
        match state.fault() {
            Fault::Slow(time) => std::thread::sleep(time),
            Fault::None => {}
            Fault::Error | Fault::Reset => break,
        }
        match read {
            Ok(n) if n > 0 && to.write_all(&buffer[..n]).is_ok() => {}
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: signals a child of this process that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// Returns a command that runs a program of PostgreSQL, as the user `postgres` if the tests run as
/// root.
fn as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(program);
    command
}

fn is_root() -> bool {
    // SAFETY: geteuid only reads.
    unsafe { libc::geteuid() == 0 }
}
