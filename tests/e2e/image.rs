//! From images to containers without a daemon: layouts, archives and a real registry, the image's configuration and
//! the user's flags, the store, and images that are made to do harm.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tar::EntryType;

use crate::harness::{Case, Ended, Exit, HANG, Images, Layer, Program, Pty, Stdin, case, digest, wait_gone};

const OURS: &str = "runc runs bundles only";

pub const CASES: &[Case] = &[
    case!(configuration_becomes_the_process).stockade_only(OURS),
    case!(flags_go_before_the_configuration).stockade_only(OURS),
    case!(layers_are_stacked_with_their_whiteouts).stockade_only(OURS),
    case!(read_only_root_has_writable_volumes).stockade_only(OURS),
    case!(standard_input_and_terminal_are_asked_for).stockade_only(OURS),
    case!(registry_is_pulled_from_once).stockade_only(OURS),
    case!(concurrent_pulls_of_one_image).stockade_only(OURS),
    case!(registry_that_lies_or_never_answers).stockade_only(OURS),
    case!(full_disk_leaves_nothing_half_made).stockade_only(OURS),
    case!(hostile_layers_touch_nothing_outside).stockade_only(OURS),
    case!(layer_of_100_000_entries).stockade_only(OURS),
    case!(detached_container_has_its_files_until_it_is_deleted).stockade_only(OURS).exclusive(),
    case!(killed_run_is_cleared_up).stockade_only(OURS).exclusive(),
    case!(store_keeps_what_is_in_use).stockade_only(OURS),
    case!(what_cannot_be_run_is_told_in_one_line).stockade_only(OURS).exclusive(),
];

#[track_caller]
fn one_line(ended: Ended, part: &str) -> String {
    let stderr = ended.code(1).stderr;
    assert!(stderr.ends_with('\n') && stderr.matches('\n').count() == 1, "not one line: {stderr:?}");
    assert!(stderr.contains(part), "does not say {part:?}: {stderr}");
    assert!(stderr.len() < 700, "too long to read: {stderr}");
    stderr
}

fn configuration_becomes_the_process() {
    let images = Images::new();
    let accounts = Layer::default()
        .dir("etc", 0o755)
        .file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\n")
        .file("etc/group", "root:x:0:\nweb:x:34:\nextra:x:99:web\n")
        .end();
    let config = json!({
        "User": "web", "WorkingDir": "/srv/not/yet", "Env": ["GREETING=hello", "PATH=/bin"],
        "Entrypoint": ["sh", "-c", "echo $GREETING $0 $1; id -u; id -G; pwd; echo $HOME; exit 7"], "Cmd": ["a", "b"],
        "Labels": { "io.stockade.memory": "1T", "kept": "label" },
    });
    let image = images.add("t", config, &[Layer::busybox(), accounts]);
    let ended = images.run(&image, &[]).code(7);
    assert_eq!(
        (ended.text().as_str(), &*ended.stderr),
        ("hello a b\n33\n34 99\n/srv/not/yet\n/srv/web\n", "")
    );
    // A warm cache.
    let again = images.run(&image, &["--", "c"]).code(7);
    assert!(again.text().starts_with("hello c\n33\n"), "{again:?}");
    images.nothing_left();
}

fn flags_go_before_the_configuration() {
    let images = Images::new();
    let image = images.busybox("t", "echo not this");
    let (shared, host) = (images.path().join("shared"), images.path().join("file"));
    fs::create_dir(&shared).unwrap();
    fs::write(&host, "from the host\n").unwrap();
    let volume = format!("{}:/data", shared.display());
    let read_only = format!("{}:/etc/file:ro", host.display());
    let script = "hostname; id -u; id -g; pwd; echo $A $B; cat /etc/file; echo x 2>/dev/null >/etc/file || echo ro; \
                  echo back >/data/out; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; \
                  grep -c . /proc/net/dev; cat /etc/hostname";
    let flags = [
        "--name",
        "e2e-flags",
        "--hostname",
        "box",
        "-u",
        "5:6",
        "-w",
        "/w",
        "-e",
        "A=1",
        "--env",
        "B=2",
        "-v",
        &volume,
        "-v",
        &read_only,
        "-m",
        "48m",
        "--cpus",
        "1",
        "--pids-limit",
        "77",
        "--net",
        "none",
        "--rm",
        "--entrypoint",
        "/bin/sh",
        "--",
        "-c",
        script,
    ];
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();
    let text = images.run(&image, &flags).ok();
    assert_eq!(text, "box\n5\n6\n/w\n1 2\nfrom the host\nro\n50331648\n100000 100000\n77\n3\nbox\n");
    assert_eq!(fs::read_to_string(shared.join("out")).unwrap(), "back\n");
    // What a container usually has, and what it has not.
    let script = "grep -E 'CapBnd|Seccomp:|NoNewPrivs' /proc/self/status | tr '\\n\\t' '  '; unshare -m true 2>&1; \
                  { echo 1 >/proc/sys/kernel/msgmax; } 2>&1 | grep -c Read-only; id -u";
    let text = images.run(&image, &["--", "sh", "-c", script]).ok();
    assert!(text.starts_with("CapBnd: 00000000800405fb NoNewPrivs: 0 Seccomp: 2 "), "{text}");
    assert!(text.contains("not permitted") && text.ends_with("\n1\n0\n"), "{text}");
    images.nothing_left();
}

fn layers_are_stacked_with_their_whiteouts() {
    let images = Images::new();
    let base = Layer::default()
        .dir("tree", 0o755)
        .file("tree/hidden", "base")
        .file("tree/changed", "base")
        .dir("opaque", 0o755)
        .file("opaque/old", "base")
        .dir("shared", 0o1777)
        .file("plain", "base")
        .end();
    let middle = Layer::default()
        .file("tree/.wh.hidden", "")
        .file("tree/changed", "middle")
        .dir("opaque", 0o755)
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "middle")
        .entry(EntryType::Link, "opaque/linked", 0o644, "opaque/new", b"")
        // Without an entry of its own: its permissions are those of the base.
        .file("shared/file", "middle")
        .entry(EntryType::Char, "device", 0o666, "", b"")
        .end();
    let top = Layer::default().symlink("link", "/tree/changed").file(".wh.plain", "").end();
    let script = "ls /tree /opaque; cat /link; echo; stat -c %a /shared; stat -c %h /opaque/linked; \
                  ls /plain /device 2>&1 | wc -l; rm -r /tree; ls -d /tree 2>&1 | wc -l; mv /opaque /moved; ls /moved";
    let config = json!({ "Cmd": ["sh", "-c", script] });
    let layers = [Layer::busybox(), base.clone(), middle, top, base.clone(), base];
    // The last two bring all of the base back, but for what they have twice.
    let image = images.add("a", config.clone(), &layers[..4]);
    let expected = "/opaque:\nlinked\nnew\n\n/tree:\nchanged\nmiddle\n1777\n2\n2\n1\nlinked\nnew\n";
    assert_eq!(images.run(&image, &[]).ok(), expected);
    // The container's changes were its own.
    assert_eq!(images.run(&image, &[]).ok(), expected);
    let image = images.add("b", config, &layers);
    let text = images.run(&image, &["--", "cat", "/tree/hidden", "/plain", "/link"]).ok();
    assert_eq!(text, "basebasebase");
    let empty = images.add("c", json!({}), &[]);
    images.run(&empty, &["--", "/bin/true"]).refused();
    images.nothing_left();
}

fn read_only_root_has_writable_volumes() {
    let images = Images::new();
    let files = Layer::default().dir("data", 0o755).file("data/initial", "there\n").end();
    let script = "touch /x 2>&1; echo new >/data/new; cat /data/*; touch /tmp/x /run/x /var/tmp/x && echo tmp; \
                  cat /etc/hosts | wc -l";
    let config = json!({ "Volumes": { "/data": {}, "/made/for/it": {} }, "Cmd": ["sh", "-c", script] });
    let image = images.add("t", config, &[Layer::busybox(), files]);
    let expected = "touch: /x: Read-only file system\nthere\nnew\ntmp\n2\n";
    for _ in 0..2 {
        assert_eq!(images.run(&image, &["--read-only"]).ok(), expected);
    }
    assert_eq!(images.run(&image, &["--", "ls", "-d", "/made/for/it"]).ok(), "/made/for/it\n");
    images.nothing_left();
}

fn standard_input_and_terminal_are_asked_for() {
    let images = Images::new();
    let image = images.busybox("t", "cat; tty");
    // The image comes first, with a line that tells how far it is.
    let (terminal, slave) = Pty::open(33, 77);
    let mut command = images.runtime().command(["run", "--image", &image, "-it", "--"]);
    command.args(["sh", "-c", "tty; stty size; echo $TERM; read line; echo got $line"]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut program = Program::spawn_raw(command, Stdin::Null);
    let first = terminal.line();
    assert!(first.contains("1 of 1 layers") && first.ends_with("/dev/pts/0"), "{first:?}");
    terminal.expect_line("33 77");
    terminal.expect_line("xterm");
    terminal.write("typed\n");
    terminal.expect_line("typed");
    terminal.expect_line("got typed");
    assert_eq!(program.exit(), Exit::Code(0));
    let with = |words: &[&str]| images.start(&image, words, Stdin::Bytes(b"input\n".to_vec())).finish();
    assert_eq!(with(&["-i"]).code(1).text(), "input\nnot a tty\n");
    assert_eq!(with(&[]).code(1).text(), "not a tty\n");
    images.nothing_left();
}

/// Debian's registry on loopback.
struct Registry {
    program: Program,
    address: String,
    data: std::path::PathBuf,
}

impl Registry {
    fn start(place: &Path) -> Self {
        // Free now; nobody else in the lab takes ports.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let data = place.join("registry");
        let config = json!({ "version": 0.1, "log": { "level": "error" }, "http": { "addr": address },
                             "storage": { "filesystem": { "rootdirectory": data } } });
        let file = place.join("registry.yml");
        fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(file);
        let program = Program::spawn(command, Stdin::Null);
        let begin = Instant::now();
        // It says nothing when it listens: a connection is the event.
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(begin.elapsed() < crate::harness::HANG, "{}", program.report());
            std::thread::yield_now();
        }
        Self { program, address, data }
    }

    /// Pushes an image with a real tool, its layers compressed as that has it.
    fn push(&self, from: &str, name: &str, compression: &str) -> String {
        let reference = format!("{}/{name}", self.address);
        let ended = tool(
            "skopeo",
            &[
                "copy",
                "--insecure-policy",
                "--dest-tls-verify=false",
                "--dest-compress-format",
                compression,
                from,
                &format!("docker://{reference}"),
            ],
        );
        ended.code(0);
        reference
    }

    /// Where it keeps a blob.
    fn blob(&self, digest: &str) -> std::path::PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.data.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// Digest of the first layer of an image there.
    fn layer(&self, reference: &str) -> String {
        let text =
            tool("skopeo", &["inspect", "--raw", "--tls-verify=false", &format!("docker://{reference}")])
                .ok();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        manifest["layers"][0]["digest"].as_str().unwrap().to_owned()
    }
}

#[track_caller]
fn tool(program: &str, words: &[&str]) -> Ended {
    let mut command = Command::new(program);
    command.args(words);
    Program::spawn(command, Stdin::Null).finish()
}

fn registry_is_pulled_from_once() {
    let images = Images::new();
    // An image as real tools make it.
    let layout = images.path().join("real");
    let (layout_text, unpacked) = (layout.display().to_string(), images.path().join("unpacked"));
    let name = format!("{layout_text}:t");
    tool("umoci", &["init", "--layout", &layout_text]).code(0);
    tool("umoci", &["new", "--image", &name]).code(0);
    tool("umoci", &["unpack", "--image", &name, &unpacked.display().to_string()]).code(0);
    tool("cp", &["-a", "/bundles/busybox/rootfs/.", &unpacked.join("rootfs").display().to_string()]).code(0);
    tool("umoci", &["repack", "--image", &name, &unpacked.display().to_string()]).code(0);
    tool("umoci", &["config", "--image", &name, "--config.cmd", "echo", "--config.cmd", "hello"]).code(0);
    assert_eq!(images.run(&format!("oci:{name}"), &[]).ok(), "hello\n");
    let archive = images.path().join("docker.tar").display().to_string();
    let copied = format!("docker-archive:{archive}:docker.io/library/x:1");
    tool("skopeo", &["copy", "--insecure-policy", &format!("oci:{name}"), &copied]).code(0);
    assert_eq!(images.run(&format!("docker-archive:{archive}:x:1"), &[]).ok(), "hello\n");

    let mut registry = Registry::start(images.path());
    let gzip = registry.push(&format!("oci:{name}"), "team/app:gzip", "gzip");
    let other = images.busybox("other", "echo zstd");
    let zstd = registry.push(&other, "team/app:zstd", "zstd");
    assert_eq!(images.run(&gzip, &[]).ok(), "hello\n");
    assert_eq!(images.run(&zstd, &[]).ok(), "zstd\n");
    let pulled = images.runtime().call(&["image", "pull", &gzip]).ok();
    let pinned = format!("{}@{}", gzip.trim_end_matches(":gzip"), pulled.trim());
    assert_eq!(images.run(&pinned, &[]).ok(), "hello\n");
    one_line(images.run(&format!("{gzip}-none"), &[]), "has no image");

    registry.program.signal(Signal::SIGKILL);
    registry.program.exit();
    assert_eq!(images.run(&gzip, &[]).ok(), "hello\n");
    assert_eq!(images.run(&zstd, &["--pull", "never"]).ok(), "zstd\n");
    one_line(images.run(&gzip, &["--pull", "always"]), "refuses the connection");
    images.nothing_left();
}

fn concurrent_pulls_of_one_image() {
    let images = Images::new();
    let filler: Vec<u8> =
        (0..400_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let layers = [Layer::busybox(), Layer::default().file("filler", filler).end()];
    let local = images.add("t", json!({ "Cmd": ["sh", "-c", "wc -c </filler"] }), &layers);
    let registry = Registry::start(images.path());
    let image = registry.push(&local, "app:1", "gzip");
    let mut runs: Vec<_> = (0..3).map(|_| images.start(&image, &[], Stdin::Null)).collect();
    let mut pulls: Vec<_> = (0..3)
        .map(|_| Program::spawn(images.runtime().command(["image", "pull", &image]), Stdin::Null))
        .collect();
    for run in &mut runs {
        assert_eq!(run.finish().ok(), "1600000\n");
    }
    for pull in &mut pulls {
        pull.finish().code(0);
    }
    assert_eq!(images.stored("layers").len(), 2);
    images.nothing_left();
}

fn registry_that_lies_or_never_answers() {
    let images = Images::new();
    let local = images.busybox("t", "echo never");
    let registry = Registry::start(images.path());
    let image = registry.push(&local, "app:1", "gzip");
    let blob = registry.blob(&registry.layer(&image));
    let whole = fs::read(&blob).unwrap();
    let mut changed = whole.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    fs::write(&blob, changed).unwrap();
    one_line(images.run(&image, &[]), "damaged or forged");
    images.nothing_left();
    fs::write(&blob, &whole[..middle]).unwrap();
    one_line(images.run(&image, &[]), "layer");
    assert_eq!(images.stored("layers"), [""; 0]);
    // What came of it is gone on with when it is whole again.
    fs::write(&blob, whole).unwrap();
    assert_eq!(images.run(&image, &[]).ok(), "never\n");
    images.nothing_left();

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let quick = images.runtime().clone().env("STOCKADE_PULL_TIMEOUT", "2");
    let words = ["run", "--image", &format!("{address}/x:1")];
    let begin = Instant::now();
    one_line(quick.call(&words), "does not answer within 2 s");
    assert!(begin.elapsed() < Duration::from_secs(60));
    // One that drips: each byte in time, and never an end.
    std::thread::spawn(move || {
        for mut stream in silent.incoming().flatten() {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n";
            let _ = stream.write_all(head);
            while stream.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    });
    one_line(quick.call(&words), "too slowly");
    assert_eq!(images.stored("images").len(), 1);
    images.nothing_left();
}

fn full_disk_leaves_nothing_half_made() {
    let images = Images::new();
    let small = images.busybox("small", "echo fits");
    // What does not compress, and is no hole.
    let large: Vec<u8> =
        (0..2_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let files = Layer::default().file("large", large).end();
    let large = images.add("large", json!({ "Cmd": ["true"] }), &[Layer::busybox(), files]);
    let disk = images.path().join("store");
    fs::create_dir_all(&disk).unwrap();
    mount(Some("e2e"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=6m")).unwrap();
    let check = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let line = one_line(images.run(&large, &[]), "No space left on device");
        assert!(line.contains("--image-store"), "{line}");
        images.nothing_left();
        assert_eq!(images.stored("images"), [""; 0]);
        assert_eq!(images.run(&small, &[]).ok(), "fits\n");
        images.nothing_left();
    }));
    umount2(&disk, MntFlags::MNT_DETACH).unwrap();
    if let Err(panic) = check {
        std::panic::resume_unwind(panic);
    }
}

fn hostile_layers_touch_nothing_outside() {
    let images = Images::new();
    let marker = images.path().join("marker");
    fs::create_dir(&marker).unwrap();
    fs::write(marker.join("file"), "untouched").unwrap();
    let outside = marker.display().to_string();
    let up = format!("{}{}", "../".repeat(12), outside.trim_start_matches('/'));
    let refused = [
        Layer::default().file("../../../../marker/file", "evil"),
        Layer::default().file(&format!("{up}/file"), "evil"),
        Layer::default().symlink("l", &outside).file("l/file", "evil"),
        Layer::default().symlink("l", &up).file("l/new", "evil"),
        Layer::default().symlink("l", &up).file("l/.wh.file", ""),
        Layer::default().entry(EntryType::Link, "h", 0o644, &format!("{outside}/file"), b""),
        Layer::default().entry(EntryType::Link, "h", 0o644, &format!("{up}/file"), b""),
        Layer::default().symlink("l", &outside).entry(EntryType::Link, "h", 0o644, "l/file", b""),
    ];
    for (number, layer) in refused.into_iter().enumerate() {
        let image = images.add(&format!("r{number}"), json!({ "Cmd": ["true"] }), &[layer.end()]);
        one_line(images.run(&image, &[]), "cannot unpack layer");
        images.nothing_left();
    }
    assert_eq!(images.stored("images"), [""; 0]);
    // Absolute paths and links mean the image's own root, also where stockade itself reads and writes.
    let layer = Layer::default()
        .file("/absolute", "inside")
        .dir("etc", 0o755)
        .symlink("etc/passwd", &format!("{outside}/file"))
        .symlink("etc/hosts", &format!("{outside}/hosts"))
        .symlink("etc/hostname", &format!("{up}/file"))
        .symlink("work", &outside)
        .symlink("volume", &up)
        .end();
    let config = json!({ "Cmd": ["sh", "-c", "cat /absolute; echo; cat /etc/hostname; ls /volume/"],
                         "WorkingDir": "/work/dir", "Volumes": { "/volume/data": {} } });
    let image = images.add("contained", config, &[Layer::busybox(), layer]);
    let ended = images.run(&image, &["--hostname", "box"]);
    if ended.exit == Exit::Code(0) {
        assert!(ended.text().starts_with("inside\nbox\n"), "{ended:?}");
    } else {
        one_line(ended, "image");
    }
    assert_eq!(fs::read_to_string(marker.join("file")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(&marker).unwrap().count(), 1);
    images.nothing_left();
}

fn layer_of_100_000_entries() {
    let images = Images::new();
    let layer =
        (0..100_000).fold(Layer::default(), |layer, n| layer.file(&format!("many/{}/{n}", n / 1000), ""));
    let image = images.add(
        "t",
        json!({ "Cmd": ["sh", "-c", "ls /many/99 | wc -l"] }),
        &[Layer::busybox(), layer.end()],
    );
    assert_eq!(images.run(&image, &[]).ok(), "1000\n");
    images.nothing_left();
}

fn detached_container_has_its_files_until_it_is_deleted() {
    let images = Images::new();
    let image = images.busybox("t", "echo mine >/written; exec sleep 100000");
    let runtime = images.runtime();
    // The caller waits for the end of its output, which the container holds.
    let mut run = images.start(&image, &["-d"], Stdin::Null);
    let id = run.line();
    assert_eq!(run.exit(), Exit::Code(0), "{}", run.report());
    let exec = |script: &str| runtime.call(&["exec", &id, "sh", "-c", script]);
    assert_eq!(exec("while ! cat /written 2>/dev/null; do sleep 0.1; done").ok(), "mine\n");
    let state: Value = serde_json::from_str(&runtime.call(&["state", &id]).ok()).unwrap();
    let bundle = state["bundle"].as_str().unwrap().to_owned();
    assert_eq!(fs::read_to_string(Path::new(&bundle).join("upper/written")).unwrap(), "mine\n");
    // Another run clears up, but not this.
    images.run(&image, &["--", "true"]).code(0);
    runtime.call(&["kill", &id, "KILL"]).code(0);
    wait_gone(i32::try_from(state["pid"].as_i64().unwrap()).unwrap());
    images.run(&image, &["--", "true"]).code(0);
    assert!(Path::new(&bundle).join("upper/written").exists());
    runtime.call(&["delete", &id]).code(0);
    images.nothing_left();
}

fn killed_run_is_cleared_up() {
    let images = Images::new();
    let image = images.busybox("t", "mkdir -p /a/b/c; echo ready; exec sleep 100000");
    let runtime = images.runtime();
    for deleted in [true, false] {
        let mut run = images.start(&image, &["--name", "e2e-killed"], Stdin::Null);
        run.expect_line("ready");
        let state: Value = serde_json::from_str(&runtime.call(&["state", "e2e-killed"]).ok()).unwrap();
        kill(Pid::from_raw(run.pid()), Signal::SIGKILL).unwrap();
        run.finish();
        wait_gone(i32::try_from(state["pid"].as_i64().unwrap()).unwrap());
        assert_eq!(images.stored("containers").len(), 1);
        if deleted {
            runtime.call(&["delete", "--force", "e2e-killed"]).code(0);
        } else {
            // As after a restart of the host, when the state in memory is gone, and with it the cgroup that an image's
            // default limits have asked for.
            fs::remove_dir_all("/run/stockade/e2e-killed").unwrap();
            let begin = Instant::now();
            for cgroup in ["/sys/fs/cgroup/e2e-killed/vmm", "/sys/fs/cgroup/e2e-killed"] {
                // Busy until the VMM has followed its supervisor.
                while let Err(e) = fs::remove_dir(cgroup) {
                    assert!(begin.elapsed() < HANG, "{cgroup}: {e}");
                }
            }
            images.run(&image, &["--", "true"]).code(0);
        }
        images.nothing_left();
    }
}

fn store_keeps_what_is_in_use() {
    let images = Images::new();
    let (base, one, two) =
        (Layer::busybox(), Layer::default().file("f", "one").end(), Layer::default().file("f", "two").end());
    let config = json!({ "Cmd": ["sh", "-c", "echo ready; exec sleep 100000"] });
    let first = images.add("one", config.clone(), &[base.clone(), one.clone()]);
    let second = images.add("two", config, &[base.clone(), two.clone()]);
    let call = |words: &[&str]| images.runtime().call(&[&["image"], words].concat());
    assert!(call(&["pull", &first]).ok().starts_with("sha256:"));
    call(&["pull", "-q", &second]).ok();
    let list = call(&["ls"]).ok();
    assert_eq!(list.lines().count(), 3);
    assert!(list.starts_with("IMAGE") && list.contains(&first) && list.contains("MB"), "{list}");
    let list: Value = serde_json::from_str(&call(&["ls", "--format", "json"]).ok()).unwrap();
    assert_eq!(list[0]["reference"], first.as_str());
    assert!(list[0]["size"].as_u64().unwrap() > 500_000);
    assert_eq!(call(&["ls", "-q"]).ok(), format!("{first}\n{second}\n"));

    let mut run = images.start(&first, &["--name", "e2e-store"], Stdin::Null);
    run.expect_line("ready");
    let hex = |layer: &[u8]| digest(layer).trim_start_matches("sha256:").to_owned();
    call(&["rm", &first, &second]).ok();
    let mut stay = vec![hex(&base), hex(&one)];
    stay.sort();
    assert_eq!(images.stored("layers"), stay);
    assert_eq!(images.runtime().call(&["exec", "e2e-store", "cat", "/f"]).ok(), "one");
    images.runtime().call(&["kill", "e2e-store", "KILL"]).code(0);
    run.finish().code(137);
    assert!(call(&["prune"]).ok().ends_with(" freed\n"));
    assert_eq!(images.stored("layers"), [""; 0]);
    assert_eq!(images.stored("blobs/sha256"), [""; 0]);
    one_line(call(&["rm", &first]), "not in the image store");
    images.nothing_left();
}

fn what_cannot_be_run_is_told_in_one_line() {
    let images = Images::new();
    let image = images.busybox("t", "true");
    let arm = images.path().join("layout/index.json");
    one_line(images.run(&image, &["-u", "nobody-here"]), "nobody-here");
    one_line(images.run(&image, &["-v", "/no/such/place:/x"]), "/no/such/place");
    one_line(images.run(&image, &["--", ""]), "names no program");
    one_line(images.run(&format!("{image}-none"), &[]), "tag t-none");
    one_line(images.run("oci:/no/such/layout", &[]), "/no/such/layout");
    one_line(images.run("oci-archive:/etc/passwd", &[]), "/etc/passwd");
    one_line(images.run("127.0.0.1:1/x", &["--pull", "never"]), "not in the image store");
    // By the parser of the command line, with a usage.
    for words in [
        vec!["run", "--image", "UPPER/case"],
        vec!["run", "--image", "x", "--net", "host"],
        vec!["run", "--image", "x", "-v", "volume:/x"],
        vec!["run", "--image", "x", "--bundle", "/b", "id"],
        vec!["run", "--tty", "id"],
        vec!["run", "id", "--", "true"],
        vec!["run"],
    ] {
        images.runtime().call(&words).code(1);
    }
    let mut index: Value = serde_json::from_str(&fs::read_to_string(&arm).unwrap()).unwrap();
    let entry = index["manifests"][0].clone();
    let platform = |arch: &str| {
        let mut entry = entry.clone();
        entry["platform"] = json!({ "os": "linux", "architecture": arch });
        entry
    };
    let inner =
        json!({ "schemaVersion": 2, "manifests": [platform("arm64"), platform("riscv64")] }).to_string();
    let name = digest(inner.as_bytes()).replace(':', "/");
    fs::write(images.path().join("layout/blobs").join(name), &inner).unwrap();
    index["manifests"] = json!([{ "mediaType": "application/vnd.oci.image.index.v1+json", "size": inner.len(),
                                  "digest": digest(inner.as_bytes()) }]);
    fs::write(&arm, index.to_string()).unwrap();
    let layout = format!("oci:{}", images.path().join("layout").display());
    one_line(images.run(&layout, &[]), "linux/arm64, linux/riscv64");
    images.nothing_left();
}
