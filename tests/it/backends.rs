//! Real backends as child processes: PostgreSQL and an S3 server (moto), each on a port of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::needed;

/// PostgreSQL with an empty database; gone when dropped.
pub struct Postgres {
    bin: PathBuf,
    dir: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Postgres {
    /// Starts one; `None` where there is no PostgreSQL (BRADLEY_TEST_POSTGRES names the folder of its programs).
    pub fn start(test: &str) -> Option<Self> {
        let bin = PathBuf::from(needed("BRADLEY_TEST_POSTGRES", test)?);
        let dir = tempfile::tempdir().unwrap();
        if is_root() {
            // PostgreSQL refuses to run as root.
            assert!(Command::new("chown").args(["postgres:"]).arg(dir.path()).status().unwrap().success());
        }
        let data = dir.path().join("data");
        let made = as_user(&bin.join("initdb"))
            .args(["--auth=trust", "--username=bradley", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data)
            .stdout(Stdio::null())
            .status();
        assert!(made.unwrap().success());
        let mut postgres = Postgres { bin, dir, port: free_port(), child: None };
        postgres.resume();
        Some(postgres)
    }

    /// The database's URL.
    pub fn url(&self) -> String {
        format!("postgres://bradley@127.0.0.1:{}/postgres", self.port)
    }

    /// Ends it as a crash does.
    pub fn crash(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let data = self.dir.path().join("data");
        let _ = as_user(&self.bin.join("pg_ctl")).args(["stop", "-m", "immediate", "-D"]).arg(data).stdout(Stdio::null()).status();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Starts it (again) and waits until it answers.
    pub fn resume(&mut self) {
        let child = as_user(&self.bin.join("postgres"))
            .arg("-D")
            .arg(self.dir.path().join("data"))
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-k"])
            .arg(self.dir.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        wait_for("PostgreSQL", || {
            let ready = Command::new(self.bin.join("pg_isready")).args(["-h", "127.0.0.1", "-p", &self.port.to_string()]).output().unwrap();
            ready.status.success()
        });
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.crash();
    }
}

/// An S3 server with the bucket `bradley`.
pub struct S3 {
    child: Child,
    port: u16,
}

impl S3 {
    /// Starts one; `None` where there is no moto (BRADLEY_TEST_PYTHON names the Python that has it).
    pub fn start(test: &str) -> Option<Self> {
        let python = needed("BRADLEY_TEST_PYTHON", test)?;
        let port = free_port();
        let child = Command::new(python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let s3 = S3 { child, port };
        wait_for("moto", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        wait_for("the bucket", || s3.request("PUT", "/bradley").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")));
        Some(s3)
    }

    /// What a server must be told to use it.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
        ]
    }

    /// It answers nothing until [`S3::thaw`].
    pub fn freeze(&self) {
        signal(self.child.id(), libc::SIGSTOP);
    }

    /// It answers again.
    pub fn thaw(&self) {
        signal(self.child.id(), libc::SIGCONT);
    }

    /// The keys below a prefix.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let answer = self.request("GET", &format!("/bradley?list-type=2&prefix={prefix}")).unwrap();
        answer.split("<Key>").skip(1).filter_map(|part| part.split("</Key>").next()).map(str::to_owned).collect()
    }

    /// Removes an object, as an accident does.
    pub fn remove(&self, key: &str) {
        self.request("DELETE", &format!("/bradley/{key}")).unwrap();
    }

    fn request(&self, method: &str, path: &str) -> std::io::Result<String> {
        use std::io::{Read, Write};
        let mut connection = std::net::TcpStream::connect(("127.0.0.1", self.port))?;
        let head = "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request\r\nContent-Length: 0";
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\nConnection: close\r\n\r\n")?;
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

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: i32) {
    // SAFETY: signals a child of this process that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

fn as_user(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

fn is_root() -> bool {
    // SAFETY: geteuid only reads.
    unsafe { libc::geteuid() == 0 }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
}
