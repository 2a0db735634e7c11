//! The runtime under what else calls runtimes on a host: buildah, and conmon by itself.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::harness::{
    Bundle, Case, Exit, HANG, Id, PODMAN_IMAGE, Podman, Program, Runtime, Stdin, case, host_scratch,
    wait_gone,
};

pub const CASES: &[Case] = &[
    case!(run_in_a_working_container_changes_what_is_committed).exclusive(),
    case!(a_dockerfile_is_built_and_its_image_runs).exclusive(),
    case!(conmon_waits_for_the_containers_process_and_tells_its_exit_code).exclusive(),
];

fn run_in_a_working_container_changes_what_is_committed() {
    let podman = Podman::new();
    let buildah = |words: &[&str]| Program::spawn(podman.buildah(words), Stdin::Null).finish();
    let name = buildah(&["from", "--pull-never", PODMAN_IMAGE]).ok();
    let runtime = Runtime::under_test().path().display().to_string();
    let run = |options: &[&str], script: &str| {
        buildah(&[&["run", "--runtime", &runtime], options, &[name.trim(), "sh", "-c", script]].concat())
    };
    assert_eq!(run(&["--network", "none"], "echo made > /made; echo out").code(0).text(), "out\n");
    let failed = run(&["--network", "none"], "cat /made; exit 3").code(3);
    assert_eq!(failed.text(), "made\n");
    // buildah puts the interface into the namespace of the process whose pid it is given.
    let address = run(&[], "ip -o -4 addr show dev eth0 | wc -l; cut -d: -f1 /proc/net/route | grep -c eth0");
    assert!(address.code(0).text().starts_with("1\n"), "no interface");
    assert!(!Path::new("/sys/class/net/eth0").exists(), "the interface is the host's");
    buildah(&["commit", "--quiet", name.trim(), "localhost/lab/made"]).code(0);
    buildah(&["rm", name.trim()]).code(0);
    let made = ["run", "--rm", "--network", "none", "localhost/lab/made", "cat", "/made"];
    assert_eq!(podman.podman(&made).ok(), "made\n");
}

fn a_dockerfile_is_built_and_its_image_runs() {
    let podman = Podman::new();
    let context = podman.dir().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("file"), "of the context\n").unwrap();
    let dockerfile = format!(
        "FROM {PODMAN_IMAGE}\nCOPY file /file\nRUN cat /file > /copy && mkdir -m 777 /writable\n\
         RUN --mount=type=cache,target=/cache echo cached > /cache/file\n\
         RUN --mount=type=cache,target=/cache cat /cache/file > /from-cache\n\
         USER 1234\nRUN id -u > /writable/who\nCMD cat /copy /from-cache /writable/who\n"
    );
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    let context = context.display().to_string();
    let build = ["build", "--network", "none", "--tag", "localhost/lab/built", &context];
    podman.podman(&build).code(0);
    let run = ["run", "--rm", "--network", "none", "localhost/lab/built"];
    assert_eq!(podman.podman(&run).ok(), "of the context\ncached\n1234\n");

    std::fs::write(podman.dir().join("context/Dockerfile"), format!("FROM {PODMAN_IMAGE}\nRUN exit 9\n"))
        .unwrap();
    let failed = podman.podman(&build).refused();
    assert!(failed.contains("exit status 9"), "{failed}");
}

fn conmon_waits_for_the_containers_process_and_tells_its_exit_code() {
    let bundle = Bundle::sh("echo out; echo error >&2; exit 7");
    let (dir, id) = (host_scratch(), Id::new());
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::create_dir(path("exits")).unwrap();
    let runtime = Runtime::under_test();
    let mut conmon = Command::new("conmon");
    conmon
        .args(["--api-version", "1", "-c", id.as_str(), "-u", id.as_str(), "-n", id.as_str()])
        .args(["-r", &runtime.path().display().to_string(), "-b", &bundle.save().display().to_string()])
        .args(["-p", &path("pid"), "--conmon-pidfile", &path("conmon"), "--exit-dir", &path("exits")])
        .args(["-l", &format!("k8s-file:{}", path("log")), "--socket-dir-path", &path("")]);
    // It leaves itself behind at once, and makes the container then.
    let mut program = Program::spawn(conmon, Stdin::Null);
    assert_eq!(program.exit(), Exit::Code(0), "{}", program.report());
    let begin = Instant::now();
    while !Path::new(&path("pid")).exists() {
        assert!(begin.elapsed() < HANG, "hung: no container is made\n{}", program.report());
    }
    let number = |name: &str| std::fs::read_to_string(path(name)).unwrap().trim().parse::<i32>().unwrap();
    assert_eq!(runtime.call(&["list", "--quiet"]).ok(), format!("{}\n", id.as_str()));
    let conmon = number("conmon");
    runtime.call(&["start", id.as_str()]).code(0);
    wait_gone(conmon);
    assert_eq!(number(&format!("exits/{}", id.as_str())), 7);
    let log = std::fs::read_to_string(path("log")).unwrap();
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F error\n"), "{log}");
    runtime.call(&["delete", id.as_str()]).code(0);
}
