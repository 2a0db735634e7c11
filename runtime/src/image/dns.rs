//! Names of registries to addresses: /etc/hosts, then the name servers of /etc/resolv.conf.
//!
//! Not getaddrinfo(3): in a static binary it would load whatever /etc/nsswitch.conf names into this process, built
//! for another C library. What is asked here are A and AAAA records, over UDP, and over TCP where the answer is too
//! long for that (RFC 1035; RFC 7766). An answer proves nothing: TLS does.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, Question, RCODE, TYPE};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// What a name server may send over UDP without being asked for more (RFC 1035, 2.3.4).
const UDP_MAX: usize = 512;
/// How many addresses are tried.
const ADDRESSES_MAX: usize = 16;
const PORT: u16 = 53;

/// A resolver.
#[derive(Debug)]
pub struct Dns {
    hosts: PathBuf,
    resolv_conf: PathBuf,
    port: u16,
}

impl Dns {
    /// As this host is set up.
    pub fn system() -> Self {
        Dns { hosts: "/etc/hosts".into(), resolv_conf: "/etc/resolv.conf".into(), port: PORT }
    }

    fn lookup(&self, host: &str, deadline: Instant) -> io::Result<Vec<IpAddr>> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse() {
            return Ok(vec![address]);
        }
        let known = in_hosts(&self.hosts, host);
        if !known.is_empty() {
            return Ok(known);
        }
        if host == "localhost" || host.ends_with(".localhost") {
            // RFC 6761, 6.3.
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        let text = fs::read(&self.resolv_conf).unwrap_or_default();
        let (config, _) = resolv_conf::Config::parse_with_errors(&text);
        let servers: Vec<IpAddr> = config.get_nameservers_or_local().into_iter().map(Into::into).collect();
        let mut error = io::Error::from(io::ErrorKind::NotFound);
        for name in candidates(host, config.ndots, config.get_last_search_or_domain().cloned()) {
            for _ in 0..config.attempts.clamp(1, 5) {
                for server in &servers {
                    let wait = Duration::from_secs(config.timeout.clamp(1, 30).into());
                    match self.ask_both(SocketAddr::new(*server, self.port), &name, wait, deadline) {
                        Ok(found) if found.is_empty() => {
                            error = io::ErrorKind::NotFound.into();
                            break;
                        }
                        Ok(found) => return Ok(found),
                        Err(e) => error = e,
                    }
                    if Instant::now() >= deadline {
                        return Err(error);
                    }
                }
                if error.kind() == io::ErrorKind::NotFound {
                    break;
                }
            }
        }
        Err(error)
    }

    /// Addresses of both kinds; none if there is no such name.
    fn ask_both(
        &self,
        server: SocketAddr,
        name: &str,
        wait: Duration,
        deadline: Instant,
    ) -> io::Result<Vec<IpAddr>> {
        let mut found = ask(server, name, TYPE::A, wait, deadline)?;
        // A host without IPv6 need not wait for what it cannot use.
        match ask(server, name, TYPE::AAAA, wait, deadline) {
            Ok(more) => found.extend(more),
            Err(_) if !found.is_empty() => {}
            Err(e) => return Err(e),
        }
        found.truncate(ADDRESSES_MAX);
        Ok(found)
    }
}

impl Resolver for Dns {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().ok_or_else(|| ureq::Error::BadUri(uri.to_string()))?;
        let port = match (uri.port_u16(), uri.scheme_str()) {
            (Some(port), _) => port,
            (None, Some("http")) => 80,
            (None, _) => 443,
        };
        let addresses = self.lookup(host, Instant::now() + *timeout.after).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ureq::Error::HostNotFound,
            _ => {
                ureq::Error::Io(io::Error::new(e.kind(), format!("the name {host} cannot be resolved: {e}")))
            }
        })?;
        let mut list = self.empty();
        for address in addresses.into_iter().take(ADDRESSES_MAX) {
            list.push(SocketAddr::new(address, port));
        }
        Ok(list)
    }
}

/// hosts(5).
fn in_hosts(path: &Path, host: &str) -> Vec<IpAddr> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let of_line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(address)
    };
    text.lines().filter_map(of_line).take(ADDRESSES_MAX).collect()
}

/// A name as it is, and with the domains of this host's network: in which order depends on its dots (resolv.conf(5)).
fn candidates(host: &str, ndots: u32, domains: impl Iterator<Item = String>) -> Vec<String> {
    if let Some(absolute) = host.strip_suffix('.') {
        return vec![absolute.to_owned()];
    }
    let mut names: Vec<_> = domains
        .map(|domain| domain.trim_matches('.').to_owned())
        .filter(|domain| !domain.is_empty())
        .map(|domain| format!("{host}.{domain}"))
        .collect();
    let at = if host.matches('.').count() >= ndots as usize { 0 } else { names.len() };
    names.insert(at, host.to_owned());
    names
}

/// One question to one server.
fn ask(
    server: SocketAddr,
    name: &str,
    kind: TYPE,
    wait: Duration,
    deadline: Instant,
) -> io::Result<Vec<IpAddr>> {
    let mut id = [0; 2];
    fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    let id = u16::from_ne_bytes(id);
    let mut query = Packet::new_query(id);
    query.set_flags(PacketFlag::RECURSION_DESIRED);
    let name = Name::new(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
    query.questions.push(Question::new(name, kind.into(), CLASS::IN.into(), false));
    let query = query.build_bytes_vec().map_err(|e| io::Error::other(e.to_string()))?;

    let until = deadline.min(Instant::now() + wait);
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    // So that nobody else's packets arrive, and a server that is not there is known at once.
    socket.connect(server)?;
    socket.send(&query)?;
    let mut buffer = [0; UDP_MAX];
    loop {
        socket.set_read_timeout(Some(left(until)?))?;
        let count = match socket.recv(&mut buffer) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        };
        match read(&buffer[..count], id) {
            Some(Answer::Addresses(list)) => return Ok(list),
            Some(Answer::Refused) => return Err(io::Error::other("the name server refuses to answer")),
            Some(Answer::TooLong) => break,
            // Not the answer to this question.
            None => {}
        }
    }
    let mut stream = TcpStream::connect_timeout(&server, left(until)?)?;
    stream.set_read_timeout(Some(left(until)?))?;
    stream.set_write_timeout(Some(left(until)?))?;
    stream.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    // 64 KiB at most.
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    match read(&answer, id) {
        Some(Answer::Addresses(list)) => Ok(list),
        _ => Err(io::Error::other("the name server's answer makes no sense")),
    }
}

fn left(until: Instant) -> io::Result<Duration> {
    match until.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

enum Answer {
    /// None if there is no such name, or nothing of that kind.
    Addresses(Vec<IpAddr>),
    Refused,
    TooLong,
}

fn read(bytes: &[u8], id: u16) -> Option<Answer> {
    let packet = Packet::parse(bytes).ok()?;
    if packet.id() != id || !packet.has_flags(PacketFlag::RESPONSE) {
        return None;
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Some(Answer::TooLong);
    }
    if !matches!(packet.rcode(), RCODE::NoError | RCODE::NameError) {
        return Some(Answer::Refused);
    }
    // Aliases are followed by the server, and lie in the same answer.
    let address = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::from(Ipv4Addr::from(a.address))),
        RData::AAAA(a) => Some(IpAddr::from(Ipv6Addr::from(a.address))),
        _ => None,
    };
    Some(Answer::Addresses(packet.answers.iter().filter_map(|record| address(&record.rdata)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::ResourceRecord;
    use simple_dns::rdata::A;
    use std::net::TcpListener;

    /// A name server on loopback that knows `there.example`, and says what it knows over TCP only if `long`.
    fn server(long: bool) -> (Dns, tempfile::TempDir) {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = udp.local_addr().unwrap().port();
        let tcp = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let answer = move |bytes: &[u8], cut: bool| {
            let query = Packet::parse(bytes).unwrap();
            let mut reply = Packet::new_reply(query.id());
            let question = query.questions[0].clone();
            let known = question.qname.to_string() == "there.example";
            if known && cut {
                reply.set_flags(PacketFlag::TRUNCATION);
            } else if known && question.qtype == TYPE::A.into() {
                let data = RData::A(A { address: 0x0a00_0001 });
                reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, 1, data));
            } else if !known {
                *reply.rcode_mut() = RCODE::NameError;
            }
            reply.questions.push(question);
            reply.build_bytes_vec().unwrap()
        };
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((count, from)) = udp.recv_from(&mut buffer) {
                // A forged answer first.
                let mut forged = answer(&buffer[..count], false);
                forged[0] ^= 0xff;
                let _ = udp.send_to(&forged, from);
                let _ = udp.send_to(&answer(&buffer[..count], long), from);
            }
        });
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query).unwrap();
                let reply = answer(&query, false);
                stream.write_all(&[&(reply.len() as u16).to_be_bytes()[..], &reply].concat()).unwrap();
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let (hosts, resolv_conf) = (dir.path().join("hosts"), dir.path().join("resolv.conf"));
        fs::write(&hosts, "# a comment\n10.0.0.9 Other.example alias # tail\n").unwrap();
        fs::write(&resolv_conf, "nameserver 127.0.0.1\nsearch example\n").unwrap();
        (Dns { hosts, resolv_conf, port }, dir)
    }

    fn found(dns: &Dns, host: &str) -> io::Result<Vec<String>> {
        let deadline = Instant::now() + Duration::from_secs(60);
        dns.lookup(host, deadline).map(|list| list.iter().map(IpAddr::to_string).collect())
    }

    #[test]
    fn names_are_looked_up_in_the_hosts_file_and_then_asked_for() {
        for long in [false, true] {
            let (dns, _dir) = server(long);
            assert_eq!(found(&dns, "there.example").unwrap(), ["10.0.0.1"]);
            assert_eq!(found(&dns, "there").unwrap(), ["10.0.0.1"]);
            assert_eq!(found(&dns, "other.EXAMPLE").unwrap(), ["10.0.0.9"]);
            assert_eq!(found(&dns, "alias").unwrap(), ["10.0.0.9"]);
            assert_eq!(found(&dns, "missing.example").unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    fn addresses_and_localhost_need_no_server() {
        let dns = Dns { hosts: "/none".into(), resolv_conf: "/none".into(), port: 1 };
        assert_eq!(found(&dns, "192.0.2.1").unwrap(), ["192.0.2.1"]);
        assert_eq!(found(&dns, "[::1]").unwrap(), ["::1"]);
        assert_eq!(found(&dns, "localhost").unwrap(), ["127.0.0.1", "::1"]);
        assert!(found(&dns, "there.example").is_err());
    }

    #[test]
    fn names_without_dots_are_this_networks_first() {
        let domains = || ["a.example".to_owned(), ".".to_owned()].into_iter();
        assert_eq!(candidates("x", 1, domains()), ["x.a.example", "x"]);
        assert_eq!(candidates("x.y", 1, domains()), ["x.y", "x.y.a.example"]);
        assert_eq!(candidates("x.", 1, domains()), ["x"]);
    }
}
