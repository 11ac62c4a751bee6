//! The one harness for tests that cross rooms: real `ff` processes in a scratch folder, on ports
//! that the kernel chooses, all ended and unmounted when the value goes out of scope.
//!
//! The tests run the binary that lies beside them in the target folder, so build it first:
//! `make test` does, and by hand `cargo build -p firefly-cli`.

pub mod history;
pub mod load;
pub mod netns;

use firefly_cli::cmd::status::ChainHealth;
use firefly_cli::connect::routing;
use firefly_cli::context::ClusterDescription;
use firefly_cli::local::{LocalCluster, Shape};
use firefly_cli::mount::MountProcess;
use firefly_cli::serve::NodeConfig;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A test that takes longer than this hangs. Not a measure of speed: on a busy machine the
/// slowest test takes a fraction of it.
pub const HANG: Duration = Duration::from_secs(240);

/// The `ff` binary under test.
pub fn ff() -> PathBuf {
    let mut dir = std::env::current_exe().expect("the test's own file");
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    let ff = dir.join("ff");
    assert!(ff.exists(), "{} is not built: run `cargo build -p firefly-cli`", ff.display());
    ff
}

/// The project's folder.
pub fn project() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("tests/ lies in the project").to_owned()
}

/// The project's Python, if `deploy/setup.sh torch` made one. `make test` requires it.
pub fn python() -> Option<PathBuf> {
    let python = project().join(".venv/bin/python");
    if python.exists() {
        return Some(python);
    }
    assert!(
        std::env::var_os("FIREFLY_REQUIRE_TORCH").is_none(),
        "{} is missing: run deploy/setup.sh torch",
        python.display()
    );
    eprintln!("SKIPPED, LOUDLY: no .venv with torch (deploy/setup.sh torch makes it)");
    None
}

/// The digits of the native quickstart. `make test` fetches them.
pub fn digits() -> Option<PathBuf> {
    let file = project().join(".cache/digits.csv.gz");
    if file.exists() {
        return Some(file);
    }
    assert!(
        std::env::var_os("FIREFLY_REQUIRE_TORCH").is_none(),
        "{} is missing: run deploy/digits/fetch.sh .cache",
        file.display()
    );
    eprintln!("SKIPPED, LOUDLY: no digits (`make digits` fetches them)");
    None
}

/// A scratch folder with a cluster in it.
pub struct Cluster {
    /// The cluster.
    pub local: LocalCluster,
    dir: tempfile::TempDir,
    mounts: Vec<MountProcess>,
}

impl Cluster {
    /// Starts a cluster of the usual shape.
    pub fn start() -> Self {
        Self::start_shape(&Shape { port_base: 0, ..Shape::default() })
    }

    /// Starts a cluster of the given shape.
    pub fn start_shape(shape: &Shape) -> Self {
        let cluster = Self::laid_out(shape);
        cluster.up();
        // A server answers a moment before the manager lets its targets serve.
        eventually("every chain serves", || cluster.is_whole());
        cluster
    }

    /// Lays a cluster out and starts nothing, so that its configuration can be changed first.
    pub fn laid_out(shape: &Shape) -> Self {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let local = LocalCluster::at(&dir.path().join("state"));
        local.create(shape).expect("the layout");
        Self { local, dir, mounts: Vec::new() }
    }

    /// Changes the configuration of a role, for its next start.
    pub fn configure(&self, role: &str, change: impl FnOnce(&mut NodeConfig)) {
        rewrite(&self.local.state().join(format!("conf/{role}.toml")), change);
    }

    /// Changes how commands reach the cluster.
    pub fn configure_commands(&self, change: impl FnOnce(&mut ClusterDescription)) {
        rewrite(&self.local.state().join("cluster.toml"), change);
    }

    /// Starts every role that does not run.
    pub fn up(&self) {
        self.local.start(&ff(), |_| ()).expect("every role starts");
    }

    /// The scratch folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Whether every chain has all its copies.
    pub fn is_whole(&self) -> bool {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let mut manager = self.local.context().unwrap().manager().await.unwrap();
            ChainHealth::of(&routing(&mut manager).await.unwrap()).is_whole()
        })
    }

    /// What `ff status` says, for programs.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.ff(&["--json", "status"]).ok()).expect("JSON")
    }

    /// Mounts the file system; returns where.
    pub fn mount(&mut self) -> PathBuf {
        let at = self.dir().join(format!("mnt{}", self.mounts.len()));
        let mount = MountProcess::start(&ff(), self.local.state(), &at).expect("the mount");
        self.mounts.push(mount);
        at
    }

    /// Takes down the latest mount.
    pub fn unmount(&mut self) {
        self.mounts.pop().expect("a mount").unmount().expect("unmounting");
    }

    /// Runs `ff` with this cluster's state folder.
    pub fn ff(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(ff());
        command.arg("--state").arg(self.local.state()).args(args);
        ran(command)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The scratch folder is about to go: what the roles said last goes to the test's output.
            for entry in std::fs::read_dir(self.local.logs()).into_iter().flatten().flatten() {
                let text = std::fs::read(entry.path()).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<_> = text.lines().collect();
                eprintln!("--- {}", entry.path().display());
                eprintln!("{}", lines[lines.len().saturating_sub(15)..].join("\n"));
            }
        }
        self.mounts.clear();
        let _ = self.local.stop(Duration::from_secs(5), |_| ());
    }
}

fn rewrite<T: serde::de::DeserializeOwned + serde::Serialize>(path: &Path, change: impl FnOnce(&mut T)) {
    let mut value: T = firefly_types::config::load(path).expect("a configuration");
    change(&mut value);
    let text = toml::to_string_pretty(&value).expect("it can be written");
    std::fs::write(path, text).expect("writing it");
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// Asserts success; returns the output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "out: {}\nerr: {}", self.out, self.err);
        self.out
    }

    /// Asserts the exit code and that the error names `what`, in a line or two without a panic.
    #[track_caller]
    pub fn fails(self, code: i32, what: &str) {
        assert_eq!(self.code, code, "out: {}\nerr: {}", self.out, self.err);
        assert!(self.err.contains(what), "{what:?} is not in: {}", self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
    }
}

/// Runs a command to its end; one that hangs is a failure.
pub fn ran(mut command: Command) -> Ran {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let pid = child.id() as i32;
    let (done, expired) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if expired.recv_timeout(HANG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // SAFETY: kill takes no pointers; the child is not reaped before `done` is dropped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    });
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the command ends");
    drop(done);
    watchdog.join().expect("the watchdog");
    Ran {
        code: status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&stdout).into_owned(),
        err: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// Waits until `condition` holds; a hang is a failure that says what was awaited.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < HANG, "{what}: not within {} s", HANG.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}
