//! Answers to a registry's challenges: basic authentication, and tokens of the service that it names.
//!
//! Credentials go to nobody in the clear but a registry on this host's own loopback.

use serde::Deserialize;
use ureq::Body;
use ureq::http::{Response, StatusCode, header};

use super::{Attempt, Error, Registry, authority, is_loopback};
use crate::image::credentials::{self, Credentials};
use crate::image::reference::Name;

/// Longest token that is believed to be one.
const TOKEN_MAX: u64 = 1 << 20;

impl Registry {
    /// Answers a challenge (RFC 9110, 11; distribution's token authentication).
    pub(super) fn authorize(&self, answer: &Response<Body>) -> Result<Attempt<String>, Error> {
        let challenges: Vec<_> = answer
            .headers()
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let find = |scheme: &str| {
            challenges.iter().find_map(|c| {
                let (name, rest) = c.split_once(' ').unwrap_or((c, ""));
                name.eq_ignore_ascii_case(scheme).then_some(rest)
            })
        };
        if let Some(parameters) = find("bearer") {
            return Ok(match self.token(parameters)? {
                Attempt::Done(token) => Attempt::Done(format!("Bearer {token}")),
                Attempt::Again(error) => Attempt::Again(error),
            });
        }
        match (find("basic"), &self.credentials) {
            (Some(_), Some(credentials)) => {
                credentials.basic().map(Attempt::Done).ok_or_else(|| self.denied())
            }
            (Some(_), None) => Err(self.denied()),
            (None, _) => Err(self.failed("it asks for an authentication that stockade does not know")),
        }
    }

    /// Asks the registry's token service.
    fn token(&self, parameters: &str) -> Result<Attempt<String>, Error> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let realm =
            parameter(parameters, "realm").ok_or_else(|| self.failed("its challenge has no realm"))?;
        let near = self.plain && realm.starts_with("http://") && is_loopback(authority(&realm));
        if !near && !realm.starts_with("https://") {
            return Err(self.failed("it wants credentials to be sent without encryption"));
        }
        let scope = format!("repository:{}:pull", self.name.repository);
        let service = parameter(parameters, "service");
        let sent = match self.credentials.as_ref().and_then(Credentials::refresh_token) {
            Some(refresh) => {
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("client_id", "stockade"),
                    ("refresh_token", refresh),
                    ("scope", &scope),
                ];
                form.extend(service.as_deref().map(|service| ("service", service)));
                self.agent.post(&realm).send_form(form)
            }
            None => {
                let mut request = self.agent.get(&realm).query("scope", &scope);
                if let Some(service) = &service {
                    request = request.query("service", service);
                }
                if let Some(basic) = self.credentials.as_ref().and_then(Credentials::basic) {
                    request = request.header(header::AUTHORIZATION, basic);
                }
                request.call()
            }
        };
        let mut answer = match sent {
            Ok(answer) => answer,
            Err(e) => return self.lost(&e).map(Attempt::Again),
        };
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(self.denied());
            }
            _ => return Ok(Attempt::Again(self.status(answer, "a token"))),
        }
        let bytes = match self.body(&mut answer, TOKEN_MAX) {
            Ok(bytes) => bytes,
            Err(Ok(again)) => return Ok(Attempt::Again(again)),
            Err(Err(error)) => return Err(error),
        };
        let token = serde_json::from_slice(&bytes).ok().and_then(|a: Answer| a.token.or(a.access_token));
        // It becomes a header.
        match token.filter(|token| token.bytes().all(|b| (0x21..0x7f).contains(&b))) {
            Some(token) => Ok(Attempt::Done(token)),
            None => Err(self.failed("its token service sends no token")),
        }
    }

    pub(super) fn denied(&self) -> Error {
        let (who, place) = match &self.credentials {
            Some(credentials) => (credentials.who(), credentials.place.clone()),
            None => ("an anonymous user".into(), credentials::FIRST_PLACE.into()),
        };
        let Name { registry, repository, .. } = &self.name;
        Error::Denied { registry: registry.clone(), who, name: repository.clone(), place }
    }
}

/// A parameter of a challenge: `name="value"` or `name=value`, with commas between (RFC 9110, 11.2).
fn parameter(text: &str, wanted: &str) -> Option<String> {
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut characters = quoted.char_indices();
                let end = loop {
                    match characters.next()? {
                        (at, '"') => break at + 1,
                        (_, '\\') => value.push(characters.next()?.1),
                        (_, character) => value.push(character),
                    }
                };
                (value, &quoted[end..])
            }
            None => {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        if name.trim().eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = after.trim_start_matches([',', ' ', '\t']);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_taken_apart() {
        let text = r#"realm="https://a.example/t?x=\"y\",z", service=plain,scope="a:b""#;
        assert_eq!(parameter(text, "REALM").unwrap(), r#"https://a.example/t?x="y",z"#);
        assert_eq!(parameter(text, "service").unwrap(), "plain");
        assert_eq!(parameter(text, "scope").unwrap(), "a:b");
        for broken in ["", "realm", "realm=\"open", "x=\"\\"] {
            assert_eq!(parameter(broken, "realm").filter(|v| v.len() > 4), None, "{broken}");
        }
    }
}
