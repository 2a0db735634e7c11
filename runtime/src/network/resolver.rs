//! Docker's name server, for containers in networks of its own.
//!
//! The daemon answers at 127.0.0.11 in the container's network namespace and writes that into the container's
//! `/etc/resolv.conf`. The guest's loopback interface is another one, so its agent takes the questions there and they are
//! asked here. A guest gets nothing by it that a plain container had not: the address is not its to choose.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use stockade_agent_protocol::{QUESTION_HEADER, QuestionHeader, RESOLVER, RESOLVER_DNS_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

/// Questions at once; further ones wait in the stream.
const QUESTIONS_MAX: usize = 64;
/// How long an answer may take: more than a resolver waits for one by default (resolv.conf(5): 5 s, twice).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// More than a `resolv.conf` has.
const FILE_MAX: u64 = 64 * 1024;

/// What a bundle mounts at `/etc/resolv.conf`, held open: this process may not find it again by its path.
pub struct ResolvConf(File);

impl ResolvConf {
    /// The file, if there is such a mount. One that cannot be opened is another's to complain of.
    pub fn of(spec: &Spec) -> Option<Self> {
        let mounts = spec.mounts().iter().flatten();
        let mount = mounts.into_iter().find(|mount| mount.destination() == Path::new("/etc/resolv.conf"))?;
        let source = mount.source().as_ref()?;
        // Not something else, which may act or wait when it is opened.
        source.metadata().ok().filter(Metadata::is_file)?;
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(source).ok().map(Self)
    }

    /// Whether it names Docker's name server now. The daemon writes that after the container has been created.
    pub fn names_resolver(&self) -> bool {
        let mut text = Vec::new();
        let read = (&self.0).rewind().and_then(|()| (&self.0).take(FILE_MAX).read_to_end(&mut text));
        let (config, _) = resolv_conf::Config::parse_with_errors(&text);
        read.is_ok() && config.nameservers.contains(&resolv_conf::ScopedIp::V4(RESOLVER))
    }
}

/// Asks what the guest wants to know, in this thread's network namespace, until its stream ends.
pub async fn carry(guest: UnixStream) -> io::Result<()> {
    ask_at((RESOLVER, RESOLVER_DNS_PORT).into(), guest).await
}

async fn ask_at(server: SocketAddr, guest: UnixStream) -> io::Result<()> {
    let (mut questions, answers) = guest.into_split();
    let answers = Rc::new(Mutex::new(answers));
    let free = Arc::new(Semaphore::new(QUESTIONS_MAX));
    loop {
        let mut header = [0; QUESTION_HEADER];
        match questions.read_exact(&mut header).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let header = QuestionHeader::decode(header).ok_or_else(|| io::Error::other("it is no question"))?;
        // Before there is memory for it: the guest can have this process keep so many at most.
        let permit = free.clone().acquire_owned().await.map_err(io::Error::other)?;
        let mut question = vec![0; header.length.into()];
        questions.read_exact(&mut question).await?;
        let answers = answers.clone();
        tokio::task::spawn_local(async move {
            let asked = timeout(ANSWER_TIMEOUT, ask(server, header.over_tcp, &question)).await;
            // As on any network, who asks is not told that there is no answer.
            if let Ok(Ok(answer)) = asked {
                let _ = reply(&answers, header, &answer).await;
            }
            drop(permit);
        });
    }
}

async fn ask(server: SocketAddr, over_tcp: bool, question: &[u8]) -> io::Result<Vec<u8>> {
    if over_tcp {
        let mut connection = TcpStream::connect(server).await?;
        let length = question.len() as u16;
        connection.write_all(&[&length.to_be_bytes(), question].concat()).await?;
        let mut answer = vec![0; connection.read_u16().await?.into()];
        connection.read_exact(&mut answer).await?;
        return Ok(answer);
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; u16::MAX.into()];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

async fn reply(answers: &Mutex<OwnedWriteHalf>, to: QuestionHeader, answer: &[u8]) -> io::Result<()> {
    let header = QuestionHeader { length: answer.len() as u16, ..to };
    answers.lock().await.write_all(&[&header.encode(), answer].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tokio::net::TcpListener;
    use tokio::task::{LocalSet, spawn_local};

    async fn exchange(guest: &mut UnixStream, header: QuestionHeader, question: &[u8]) -> (u32, Vec<u8>) {
        let header = QuestionHeader { length: question.len() as u16, ..header };
        guest.write_all(&[&header.encode(), question].concat()).await.unwrap();
        let mut header = [0; QUESTION_HEADER];
        guest.read_exact(&mut header).await.unwrap();
        let header = QuestionHeader::decode(header).unwrap();
        let mut answer = vec![0; header.length.into()];
        guest.read_exact(&mut answer).await.unwrap();
        (header.number, answer)
    }

    #[tokio::test]
    async fn questions_are_asked_as_they_came_and_answered_by_their_numbers() {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(server).await.unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        let local = LocalSet::new();
        local.spawn_local(async move {
            let mut question = [0; 64];
            let (length, from) = udp.recv_from(&mut question).await.unwrap();
            udp.send_to(&[b"udp ", &question[..length]].concat(), from).await.unwrap();
        });
        local.spawn_local(async move {
            let (mut connection, _) = tcp.accept().await.unwrap();
            let mut question = vec![0; connection.read_u16().await.unwrap().into()];
            connection.read_exact(&mut question).await.unwrap();
            connection.write_u16(4 + question.len() as u16).await.unwrap();
            connection.write_all(&[b"tcp ", &question[..]].concat()).await.unwrap();
        });
        local
            .run_until(async {
                let carried = spawn_local(ask_at(server, host));
                let header = QuestionHeader { number: 7, over_tcp: false, length: 0 };
                assert_eq!(exchange(&mut guest, header, b"one").await, (7, b"udp one".to_vec()));
                let header = QuestionHeader { number: 9, over_tcp: true, length: 0 };
                assert_eq!(exchange(&mut guest, header, b"two").await, (9, b"tcp two".to_vec()));
                drop(guest);
                carried.await.unwrap().unwrap();
            })
            .await;
    }

    #[tokio::test]
    async fn a_stream_of_something_else_is_given_up() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(&[0xff; QUESTION_HEADER]).await.unwrap();
        assert!(carry(host).await.is_err_and(|e| e.to_string().contains("no question")));
    }

    #[test]
    fn resolv_conf_is_read_as_it_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let write = |text: &str| File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        write("nameserver 10.0.0.1\n");
        let spec = |source: &Path| -> Spec {
            let mount = serde_json::json!({ "destination": "/etc/resolv.conf", "source": source });
            serde_json::from_value(serde_json::json!({ "ociVersion": "1.2.0", "mounts": [mount] })).unwrap()
        };
        let file = ResolvConf::of(&spec(&path)).unwrap();
        assert!(!file.names_resolver());
        write("search example\nnameserver 127.0.0.11\noptions ndots:0\n");
        assert!(file.names_resolver());
        write("nameserver 127.0.0.1\n# nameserver 127.0.0.11\n");
        assert!(!file.names_resolver());
        assert!(ResolvConf::of(&spec(&dir.path().join("none"))).is_none());
        assert!(ResolvConf::of(&Spec::default()).is_none());
    }
}
