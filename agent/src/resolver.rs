//! Docker's name server, for containers in networks of their own.
//!
//! On the host it answers at 127.0.0.11 in the container's network namespace, which in the guest is another place. Here a
//! question to that address is numbered and goes to the host in one stream, where it is asked as it was here, over UDP or
//! TCP, and its answer comes back by the number.
//!
//! Port 53 stays free for servers of containers, of which many listen on all addresses: the sockets have a port of their
//! own, and programs on the guest's uppermost cgroup change it for the other where a process connects, sends, or is told
//! where from it has received. On the host a rule of the firewall does that.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex as Map, MutexGuard, PoisonError};
use std::time::Duration;

use stockade_agent_protocol::{QUESTION_HEADER, QuestionHeader, RESOLVER, RESOLVER_DNS_PORT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::timeout;

use crate::bpf::{self, Hook, Instruction};
use crate::cgroup;
use crate::error::Error;
use crate::vsock::Listener;

/// Questions that wait for their answers. When more come, the oldest is forgotten, as a datagram may be.
const WAITING_MAX: usize = 256;
/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may be silent, in a question or between two, and how long its answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tries to get the same port for both sockets.
const TRIES: usize = 16;

/// What listens in place of the name server.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    /// Listens, and has what goes to the name server come here.
    pub fn open() -> Result<Self, Error> {
        let failed = |e: io::Error| Error::os("listening for questions to Docker's name server", e);
        let sockets = Self::listen().map_err(failed)?;
        let port = sockets.udp.local_addr().map_err(failed)?.port();
        let cgroup = File::open(cgroup::ROOT).map_err(failed)?;
        for hook in [Hook::Connect, Hook::Send] {
            hook.attach(&cgroup, &redirect(RESOLVER_DNS_PORT, port)).map_err(failed)?;
        }
        Hook::Receive.attach(&cgroup, &redirect(port, RESOLVER_DNS_PORT)).map_err(failed)?;
        Ok(sockets)
    }

    fn listen() -> io::Result<Self> {
        let mut result = Err(io::Error::from(io::ErrorKind::AddrInUse));
        for _ in 0..TRIES {
            let udp = std::net::UdpSocket::bind((RESOLVER, 0))?;
            result = std::net::TcpListener::bind(udp.local_addr()?).and_then(|tcp| {
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                Ok(Sockets { udp: UdpSocket::from_std(udp)?, tcp: TcpListener::from_std(tcp)? })
            });
            if result.is_ok() {
                break;
            }
        }
        result
    }
}

/// Changes one port of the name server's address for another in a `struct bpf_sock_addr`, and allows everything.
fn redirect(from: u16, to: u16) -> [Instruction; 8] {
    /// Offsets in it. Both fields are in network byte order, the port in the first two bytes of four.
    const ADDRESS: i16 = 4;
    const PORT: i16 = 24;
    let address = u32::from_ne_bytes(RESOLVER.octets());
    let port = |port: u16| u32::from(port.to_be());
    [
        bpf::load_word(2, ADDRESS),
        bpf::jump_if_not_equal(2, address, 4),
        bpf::load_word(2, PORT),
        bpf::jump_if_not_equal(2, port(from), 2),
        bpf::mov_imm(2, port(to)),
        bpf::store_word(PORT, 2),
        bpf::mov_imm(0, 1),
        Instruction::exit(),
    ]
}

/// Serves with the one stream that the host opens, until that ends.
pub async fn serve(sockets: Sockets, mut listener: Listener) {
    let stream = match listener.accept().await {
        Ok(stream) => stream,
        Err(e) => return tracing::warn!("cannot accept the stream for questions to the name server: {e}"),
    };
    drop(listener);
    if let Err(e) = relay(sockets, stream).await {
        tracing::warn!("questions to the name server are not answered any more: {e}");
    }
}

async fn relay(sockets: Sockets, host: impl AsyncRead + AsyncWrite + Send + 'static) -> io::Result<()> {
    let (mut answers, questions) = split(host);
    let relay = Arc::new(Relay {
        udp: sockets.udp,
        questions: Mutex::new(questions),
        waiting: Map::default(),
        last: AtomicU32::new(0),
    });
    tokio::select! {
        ended = relay.datagrams() => ended,
        ended = connections(&relay, sockets.tcp) => ended,
        ended = relay.answers(&mut answers) => ended,
    }
}

struct Relay<W> {
    udp: UdpSocket,
    questions: Mutex<W>,
    waiting: Map<BTreeMap<u32, Asker>>,
    last: AtomicU32,
}

/// Who waits for an answer.
enum Asker {
    Datagram(SocketAddr),
    Connection(oneshot::Sender<Vec<u8>>),
}

impl<W: AsyncWrite + Unpin> Relay<W> {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u32, Asker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, asker: Asker, message: &[u8]) -> io::Result<()> {
        let length = u16::try_from(message.len()).map_err(io::Error::other)?;
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let header = QuestionHeader { number, over_tcp: matches!(asker, Asker::Connection(_)), length };
        {
            let mut waiting = self.waiting();
            if waiting.len() >= WAITING_MAX {
                waiting.pop_first();
            }
            waiting.insert(number, asker);
        }
        let mut questions = self.questions.lock().await;
        questions.write_all(&[&header.encode(), message].concat()).await
    }

    async fn datagrams(&self) -> io::Result<()> {
        let mut message = vec![0; u16::MAX.into()];
        loop {
            // An error is of one datagram: of an answer that nobody took.
            if let Ok((length, from)) = self.udp.recv_from(&mut message).await {
                self.ask(Asker::Datagram(from), &message[..length]).await?;
            }
        }
    }

    async fn converse(&self, mut connection: TcpStream) -> io::Result<()> {
        loop {
            let question = async {
                let mut message = vec![0; connection.read_u16().await?.into()];
                connection.read_exact(&mut message).await.map(|_| message)
            };
            let message = timeout(PATIENCE, question).await??;
            let (sender, answer) = oneshot::channel();
            self.ask(Asker::Connection(sender), &message).await?;
            let answer = timeout(PATIENCE, answer).await?.map_err(io::Error::other)?;
            connection.write_u16(answer.len() as u16).await?;
            connection.write_all(&answer).await?;
        }
    }

    async fn answers(&self, host: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        loop {
            let mut header = [0; QUESTION_HEADER];
            host.read_exact(&mut header).await?;
            let header = QuestionHeader::decode(header).ok_or_else(|| io::Error::other("it is no header"))?;
            let mut message = vec![0; header.length.into()];
            host.read_exact(&mut message).await?;
            let asker = self.waiting().remove(&header.number);
            match asker {
                // One that cannot be delivered is lost, as a datagram may be.
                Some(Asker::Datagram(to)) => drop(self.udp.send_to(&message, to).await),
                Some(Asker::Connection(sender)) => drop(sender.send(message)),
                None => {}
            }
        }
    }
}

async fn connections<W>(relay: &Arc<Relay<W>>, listener: TcpListener) -> io::Result<()>
where
    W: AsyncWrite + Unpin + Send + 'static,
{
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = free.clone().acquire_owned().await.map_err(io::Error::other)?;
        match listener.accept().await {
            Ok((connection, _)) => {
                let relay = relay.clone();
                tokio::spawn(async move {
                    // It ends with an error always: mostly that the other side has closed it.
                    let _ = relay.converse(connection).await;
                    drop(permit);
                });
            }
            // No descriptor or memory free: both come back when something else is closed, and nothing tells when.
            Err(e) => {
                tracing::warn!("cannot accept a question: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    /// Runs a program as the kernel would; what becomes of the port.
    fn run(program: &[Instruction], address: [u8; 4], port: u16) -> u16 {
        let mut context = [0u32; 7];
        (context[1], context[6]) = (u32::from_ne_bytes(address), port.to_be().into());
        let mut registers = [0u32; 10];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                0x61 => registers[to] = context[i.offset as usize / 4],
                0x63 => context[i.offset as usize / 4] = registers[from],
                0xb4 => registers[to] = i.immediate as u32,
                0x56 if registers[to] != i.immediate as u32 => at += i.offset as usize,
                0x56 => {}
                0x95 => break,
                other => panic!("instruction {other:#x}"),
            }
        }
        assert_eq!(registers[0], 1, "it is allowed");
        u16::from_be(context[6] as u16)
    }

    #[test]
    fn only_the_name_servers_port_is_changed() {
        let program = redirect(53, 40_001);
        assert_eq!(run(&program, [127, 0, 0, 11], 53), 40_001);
        assert_eq!(run(&program, [127, 0, 0, 11], 54), 54);
        assert_eq!(run(&program, [127, 0, 0, 1], 53), 53);
        assert_eq!(run(&program, [11, 0, 0, 127], 53), 53);
        assert_eq!(run(&redirect(40_001, 53), [127, 0, 0, 11], 40_001), 53);
    }

    /// A relay, the addresses of its sockets, and the host's end of its stream.
    fn start() -> (SocketAddr, SocketAddr, DuplexStream) {
        let sockets = Sockets::listen().unwrap();
        let addresses = (sockets.udp.local_addr().unwrap(), sockets.tcp.local_addr().unwrap());
        let (guest, host) = duplex(4096);
        tokio::spawn(relay(sockets, guest));
        (addresses.0, addresses.1, host)
    }

    async fn question(host: &mut DuplexStream) -> (QuestionHeader, Vec<u8>) {
        let mut header = [0; QUESTION_HEADER];
        host.read_exact(&mut header).await.unwrap();
        let header = QuestionHeader::decode(header).unwrap();
        let mut message = vec![0; header.length.into()];
        host.read_exact(&mut message).await.unwrap();
        (header, message)
    }

    async fn answer(host: &mut DuplexStream, to: QuestionHeader, message: &[u8]) {
        let header = QuestionHeader { length: message.len() as u16, ..to };
        host.write_all(&[&header.encode(), message].concat()).await.unwrap();
    }

    #[tokio::test]
    async fn answers_go_to_who_asked_in_any_order() {
        let (udp, tcp, mut host) = start();
        assert_eq!((udp.ip(), udp.port()), (RESOLVER.into(), tcp.port()));
        let one = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let other = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        one.send_to(b"one", udp).await.unwrap();
        let first = question(&mut host).await;
        other.send_to(b"other", udp).await.unwrap();
        let second = question(&mut host).await;
        assert_eq!((&first.1[..], &second.1[..]), (&b"one"[..], &b"other"[..]));
        assert!(!first.0.over_tcp && first.0.number != second.0.number);

        answer(&mut host, second.0, b"for other").await;
        answer(&mut host, first.0, b"for one").await;
        let mut buffer = [0; 64];
        let (length, from) = one.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..length], from), (&b"for one"[..], udp));
        let length = other.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"for other");
    }

    #[tokio::test]
    async fn a_connection_asks_more_than_once() {
        let (_, tcp, mut host) = start();
        let mut connection = TcpStream::connect(tcp).await.unwrap();
        for word in [&b"first"[..], b"second"] {
            connection.write_u16(word.len() as u16).await.unwrap();
            connection.write_all(word).await.unwrap();
            let (header, message) = question(&mut host).await;
            assert!(header.over_tcp && message == word);
            answer(&mut host, header, &[word, word].concat()).await;
            assert_eq!(usize::from(connection.read_u16().await.unwrap()), 2 * word.len());
            let mut answer = vec![0; 2 * word.len()];
            connection.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, [word, word].concat());
        }
    }

    #[tokio::test]
    async fn questions_that_are_not_answered_are_forgotten() {
        let (udp, _, mut host) = start();
        let asker = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut headers = Vec::new();
        for _ in 0..=WAITING_MAX {
            asker.send_to(b"?", udp).await.unwrap();
            headers.push(question(&mut host).await.0);
        }
        answer(&mut host, headers[0], b"late").await;
        answer(&mut host, headers[1], b"in time").await;
        let mut buffer = [0; 64];
        let length = asker.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"in time");
    }
}
