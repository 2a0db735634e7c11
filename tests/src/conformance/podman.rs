//! Podman's system tests. The images that they pull come from a registry in the lab, which serves stand-ins made of
//! the lab's busybox under the names that the tests know.

use super::source::Source;
use super::suite::{LaidOut, Suite};
use super::{Context, PAYLOAD, WORK, cover_usr, sh};
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// It.
pub const SUITE: Suite = Suite {
    name: "podman",
    source: Source {
        package: "libpod",
        folders: &["test/system"],
        // What cases call on the host that the lab has not.
        tools: "openssl,apache2-utils,slirp4netns,xz-utils",
        kind: "podman-suite",
    },
    kept: (include_str!("../../conformance/podman.md"), "tests/conformance/podman.md"),
    waits_for: Some("podman"),
    // Cases of cp make twenty containers one after another. One call of podman may take $PODMAN_TIMEOUT below.
    stalled: Duration::from_secs(1800),
    limit: Duration::from_secs(8 * 3600),
    environment: &[],
    lay_out,
};

/// What one call of podman may take, in seconds; 120 where nothing is emulated.
const CALL_LIMIT: &str = "400";
/// Ten times as much for what cases bound themselves, as edits by sed(1); more for thirty builds at once.
const MORE_TIME: [&str; 9] = [
    "s/timeout 10 socat/timeout 100 socat/",
    "s/--kill=10 60 /--kill=10 1700 /",
    r#"s/(delta_t"? -le [0-9]+)/\10/"#,
    r#"s/"\[3456\]" "delta t/"[0-9]\\+" "delta t/"#,
    r"s/(PODMAN_TIMEOUT=[0-9]+) run/\10 run/",
    r"s/^(RUN sleep 30)$/\10/",
    "s/--max-time 3 /--max-time 30 /",
    "s/sleep 10;echo d;/sleep 100;echo d;/",
    r"s/(local _?timeout=(\$\{[0-9]:-)?[0-9]+)/\10/",
];
/// A tool's words, which are its C library's: Alpine's are shorter than those in the lab.
const WORDS: &str = "s/nc: bind: Address in use/nc: bind: Address already in use/";
/// Where the registry listens: below the ports that cases take for themselves.
const REGISTRY: &str = "127.0.0.1:4999";
/// For how long it may be silent after its start.
const REGISTRY_LIMIT: Duration = Duration::from_secs(60);
/// The image that nearly all cases use, and the one that must not be there before a case pulls it, with their tags.
const IMAGE: &str = "quay.io/libpod/testimage";
const TAGS: [&str; 2] = ["20220615", "00000004"];
/// Further names for the other, which updates find to be new.
const ALIASES: [&str; 2] = ["quay.io/libpod/alpine:latest", "quay.io/libpod/busybox:latest"];

/// What networks and images need of the host's kernel.
const MODULES: &str = "loop overlay veth bridge br_netfilter tun ip_tables ip6_tables iptable_nat ip6table_nat \
                       iptable_filter xt_conntrack xt_MASQUERADE xt_addrtype xt_comment xt_mark xt_multiport";

fn lay_out(runtime: &Path) -> Result<LaidOut, String> {
    let place = Path::new(WORK);
    sh(&format!("cp -a {PAYLOAD}/suite {WORK} && mkdir -p {WORK}/bin {WORK}/image {WORK}/registry"))?;
    let edits =
        MORE_TIME.iter().chain([&WORDS]).map(|edit| format!("-e '{edit}'")).collect::<Vec<_>>().join(" ");
    sh(&format!("sed -i -E {edits} {WORK}/test/system/*.ba*"))?;
    // Where `make install` leaves the guest's files: a case runs a copy of the runtime from another folder.
    sh("[ ! -e /payload/lib/stockade ] || ln -s /payload/lib/stockade /usr/local/lib/stockade")?;
    cover_usr()?;
    sh(&format!("modprobe -a {MODULES}"))?;
    sh(&format!("ln -s /bin/busybox {WORK}/bin/nc"))?;
    let podman = place.join("bin/podman");
    let files = [
        (Path::new("/etc/containers/containers.conf"), configuration(runtime)),
        (Path::new("/etc/containers/registries.conf.d/lab.conf"), registries()),
        (&podman, wrapper(runtime)),
        (&place.join("registry.yml"), registry()),
        (&place.join("openssl.cnf"), OPENSSL.into()),
        (&place.join("image/pause"), PAUSE.into()),
        (&place.join("image/printenv"), PRINTENV.into()),
        (&place.join("image/Containerfile"), CONTAINERFILE.into()),
    ];
    for (path, text) in files {
        fs::write(path, text).or_say(path.display())?;
    }
    sh(&format!("chmod 755 {WORK}/bin/podman {WORK}/image/p*"))?;
    start_registry(place)?;
    make_images()?;
    let path = format!("{WORK}/bin:{}", std::env::var("PATH").or_say("read PATH")?);
    let environment = vec![
        ("PODMAN", podman),
        ("PODMAN_TIMEOUT", CALL_LIMIT.into()),
        ("PATH", path.into()),
        ("OPENSSL_CONF", place.join("openssl.cnf")),
    ];
    Ok(LaidOut { folder: place.join("test/system"), environment })
}

/// `containers.conf` with this runtime as the host's own.
fn configuration(runtime: &Path) -> String {
    let name = runtime.file_name().unwrap_or_default().display();
    format!("[engine]\nruntime = \"{name}\"\n[engine.runtimes]\n{name} = [\"{}\"]\n", runtime.display())
}

/// Podman for the cases. Some bring a containers.conf of their own, and most of these name no runtime.
fn wrapper(runtime: &Path) -> String {
    let own = "[ -n \"$CONTAINERS_CONF\" ] && ! grep -q '^ *runtime *=' \"$CONTAINERS_CONF\"";
    let named = format!("set -- --runtime {} \"$@\"", runtime.display());
    format!("#!/bin/sh\nif {own}; then {named}; fi\nexec /usr/bin/podman \"$@\"\n")
}

fn registries() -> String {
    format!("[[registry]]\nprefix = \"quay.io/libpod\"\nlocation = \"{REGISTRY}/libpod\"\ninsecure = true\n")
}

fn registry() -> String {
    format!(
        "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{REGISTRY}\"}}\n\
         storage: {{filesystem: {{rootdirectory: {WORK}/registry}}}}\n"
    )
}

fn start_registry(place: &Path) -> Result<(), String> {
    let log = fs::File::create(place.join("registry.log")).or_say("keep the registry's log")?;
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(place.join("registry.yml")).stderr(log.try_clone().or_say("use its log")?);
    command.stdout(log).stdin(std::process::Stdio::null()).spawn().or_say("run docker-registry")?;
    let begin = Instant::now();
    // It says nothing when it listens: a connection is the event.
    while TcpStream::connect(REGISTRY).is_err() {
        if begin.elapsed() > REGISTRY_LIMIT {
            return Err(format!("the registry does not listen on {REGISTRY}: see {WORK}/registry.log"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// As much as openssl-req(1) must find: the lab has only what tools keep in /usr.
const OPENSSL: &str = "[req]\ndistinguished_name = name\n[name]\n";

/// A command for an infra container, which says its name and then nothing.
const PAUSE: &str =
    "#!/bin/sh\necho \"Confirmed: testimage pause invoked as $0\"\nwhile :; do sleep 0.1; done\n";

/// What Debian's busybox has not.
const PRINTENV: &str = r#"#!/bin/sh
# What the shell itself was given: it exports more.
environment() { tr '\0' '\n' </proc/$$/environ; }
[ $# != 0 ] || { environment; exit; }
missing=0
for name; do environment | sed -n "s/^$name=//p" | grep '' || missing=1; done
exit $missing
"#;

/// What cases ask for in the image: its two layers, its labels, its working directory, its command.
const CONTAINERFILE: &str = r#"
FROM scratch
ADD root.tar /
COPY printenv /bin/
LABEL created_by=test/system/build-testimage
LABEL created_at=CREATED
WORKDIR /home/podman
CMD ["/bin/echo", "This container is a stand-in for Podman's test image"]
"#;

/// Makes `root.tar`, the root of a small distribution: busybox with its links, and the files that cases look at.
const ROOT: &str = r#"
cp -a /bundles/busybox/rootfs root
cd root
rm -r usr
mkdir -p usr/local/bin usr/sbin usr/share home/podman lib media mnt opt run srv var/log var/tmp
chmod 1777 tmp var/tmp
chmod 700 root
ln -s ../bin usr/bin
ln -s busybox bin/busybox-extras
ln -s /proc/mounts etc/mtab
cat >etc/passwd <<END
root:x:0:0:root:/root:/bin/sh
bin:x:1:1:bin:/bin:/sbin/nologin
daemon:x:2:2:daemon:/sbin:/sbin/nologin
mail:x:8:12:mail:/var/mail:/sbin/nologin
guest:x:405:100:guest:/dev/null:/sbin/nologin
nobody:x:65534:65534:nobody:/:/sbin/nologin
END
cat >etc/group <<END
root:x:0:root
bin:x:1:root,bin,daemon
daemon:x:2:root,bin,daemon
mail:x:12:mail
users:x:100:
ping:x:999:
nobody:x:65534:
END
echo 'root:*::0:::::' >etc/shadow
chmod 640 etc/shadow
printf 'ID=lab\nNAME="busybox of the lab"\n' >etc/os-release
echo 3.16.0 >etc/alpine-release
echo lab >etc/hostname
echo "ssh 22/tcp" >etc/services
: >etc/hosts
cp ../pause home/podman/
# As many files as a distribution would have at least.
mkdir usr/share/misc
for file in $(seq 60); do echo $file >usr/share/misc/$file; done
echo $TAG >home/podman/testimage-id
touch --date=@1600000000 home/podman/testimage-id
tar -cf ../root.tar *
"#;

/// Further images: a registry of Debian's program, and one in which nothing can run.
const OWN: [&str; 2] = ["quay.io/libpod/registry:2.8", "quay.io/libpod/autoupdatebroken:latest"];
/// Makes them.
const OWN_IMAGES: &str = r#"
mkdir -p own/tmp own/etc
cp --parents -L $(ldd /usr/bin/docker-registry | grep -o '/[^ ]*') /usr/bin/docker-registry own
cat >own/etc/registry.yml <<END
version: 0.1
http: {addr: ":5000"}
storage: {filesystem: {rootdirectory: /var/lib/registry}}
END
podman build --quiet -t quay.io/libpod/registry:2.8 -f - own >/dev/null <<END
FROM scratch
COPY . /
VOLUME /var/lib/registry
ENTRYPOINT ["/usr/bin/docker-registry"]
CMD ["serve", "/etc/registry.yml"]
END
podman build --quiet -t quay.io/libpod/autoupdatebroken -f - own >/dev/null <<END
FROM scratch
LABEL broken=yes
END
"#;

/// Makes the images and pushes them under their names.
fn make_images() -> Result<(), String> {
    let [tag, other] = TAGS;
    sh(&format!("set -e; cd {WORK}/image; TAG={tag}; {ROOT}"))?;
    let build = |tag: &str, created: &str| {
        let file = format!("sed \"s/CREATED/{created}/\" {WORK}/image/Containerfile");
        sh(&format!("{file} | podman build --quiet -t {IMAGE}:{tag} -f - {WORK}/image >/dev/null"))
    };
    build(tag, "$(date -u +%Y-%m-%dT%H:%M:%SZ)")?;
    // Another image, and it only has to be one.
    build(other, "2021-01-01T00:00:00Z")?;
    for name in ALIASES {
        sh(&format!("podman tag {IMAGE}:{other} {name}"))?;
    }
    sh(&format!("set -e; cd {WORK}/image; {OWN_IMAGES}"))?;
    let names = TAGS.map(|tag| format!("{IMAGE}:{tag}")).into_iter().chain(ALIASES.map(String::from));
    let names = names.chain(OWN.map(String::from));
    for name in names {
        let place = name.replacen("quay.io", REGISTRY, 1);
        sh(&format!("podman push --quiet --tls-verify=false {name} docker://{place}"))?;
    }
    sh("podman rmi --all --force >/dev/null")
}
