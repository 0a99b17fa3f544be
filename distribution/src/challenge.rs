//! `WWW-Authenticate`: the challenges of a 401 (RFC 9110, section 11.6.1).
//!
//! One header may hold several challenges and one challenge several parameters, both separated by commas. The parser
//! takes what registries send: it stops at what it cannot read and keeps the challenges before.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// The most challenges that are read of one response.
const MAX_CHALLENGES: usize = 16;
/// The most parameters of a challenge.
const MAX_PARAMETERS: usize = 32;

/// One challenge: how a host wants to be told who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme in lower case, such as `bearer`.
    pub scheme: String,
    /// The parameters in their order, names in lower case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of a name (in lower case).
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The challenges of a response's headers, in their order.
pub(crate) fn of_headers(headers: &HeaderMap) -> Vec<Challenge> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let mut challenges: Vec<Challenge> = texts.flat_map(parse_challenges).collect();
    challenges.truncate(MAX_CHALLENGES);
    challenges
}

/// The challenges of one header value, in their order; what comes after something unreadable is left out.
pub fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut input = Input { rest: text };
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        input.skip(|byte| matches!(byte, b' ' | b'\t' | b','));
        let Some(word) = input.token() else { return challenges };
        let blank = input.skip(is_blank);
        // `name=value` goes on with the challenge before; a name that stands alone begins a new one.
        if input.rest.starts_with('=')
            && let Some(challenge) = challenges.last_mut()
        {
            let Some(value) = input.value() else { return challenges };
            if challenge.parameters.len() < MAX_PARAMETERS {
                challenge.parameters.push((word.to_ascii_lowercase(), value));
            }
            continue;
        }
        if challenges.len() == MAX_CHALLENGES {
            return challenges;
        }
        challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
        if blank {
            input.token68();
        }
    }
}

struct Input<'a> {
    rest: &'a str,
}

impl<'a> Input<'a> {
    /// Skips bytes; whether there were any.
    fn skip(&mut self, mut what: impl FnMut(u8) -> bool) -> bool {
        let end = self.rest.bytes().position(|byte| !what(byte)).unwrap_or(self.rest.len());
        self.rest = &self.rest[end..];
        end > 0
    }

    /// A token (section 5.6.2).
    fn token(&mut self) -> Option<&'a str> {
        let text = self.rest;
        self.skip(is_token).then(|| &text[..text.len() - self.rest.len()])
    }

    /// `=` and a token or a quoted string. Some servers leave out the quotes around an address.
    fn value(&mut self) -> Option<String> {
        self.rest = self.rest.strip_prefix('=')?;
        self.skip(is_blank);
        if let Some(quoted) = self.rest.strip_prefix('"') {
            self.rest = quoted;
            return self.quoted();
        }
        let text = self.rest;
        self.skip(|byte| byte.is_ascii_graphic() && !matches!(byte, b',' | b'"'));
        Some(text[..text.len() - self.rest.len()].to_owned())
    }

    /// The rest of a quoted string (section 5.6.4); none if it has no end.
    fn quoted(&mut self) -> Option<String> {
        let mut value = String::new();
        let mut characters = self.rest.char_indices();
        while let Some((index, character)) = characters.next() {
            match character {
                '"' => {
                    self.rest = &self.rest[index + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                _ => value.push(character),
            }
        }
        None
    }

    /// Skips the `token68` that some schemes have instead of parameters: up to a comma or the end, without a blank.
    fn token68(&mut self) {
        let mut probe = Input { rest: self.rest };
        probe.skip(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'+' | b'/')
        });
        probe.skip(|byte| byte == b'=');
        probe.skip(is_blank);
        if probe.rest.is_empty() || probe.rest.starts_with(',') {
            self.rest = probe.rest;
        }
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Vec<(String, Vec<(String, String)>)> {
        parse_challenges(text).into_iter().map(|one| (one.scheme, one.parameters)).collect()
    }

    fn challenge(scheme: &str, parameters: &[(&str, &str)]) -> (String, Vec<(String, String)>) {
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        (scheme.to_owned(), parameters.collect())
    }

    #[test]
    fn reads_what_registries_send() {
        let text = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#;
        let wanted = [
            ("realm", "https://auth.example/token"),
            ("service", "registry.example"),
            ("scope", "repository:a/b:pull,push"),
        ];
        assert_eq!(parsed(text), [challenge("bearer", &wanted)]);
        assert_eq!(parsed(r#"Basic realm="a \"b\" \\c""#), [challenge("basic", &[("realm", r#"a "b" \c"#)])]);
        assert_eq!(parsed("basic"), [challenge("basic", &[])]);
        assert_eq!(
            parsed("Bearer realm=https://h/t?x=1, service=s"),
            [challenge("bearer", &[("realm", "https://h/t?x=1"), ("service", "s")])]
        );
    }

    #[test]
    fn several_challenges_in_one_header() {
        let text = r#"Negotiate, NTLM abc+/=, Basic realm="x", Bearer realm = "y" , error="invalid_token""#;
        assert_eq!(
            parsed(text),
            [
                challenge("negotiate", &[]),
                challenge("ntlm", &[]),
                challenge("basic", &[("realm", "x")]),
                challenge("bearer", &[("realm", "y"), ("error", "invalid_token")]),
            ]
        );
    }

    #[test]
    fn the_unreadable_ends_it() {
        assert_eq!(
            parsed(r#"Basic realm="x", Bearer realm="no end"#),
            [challenge("basic", &[("realm", "x")]), challenge("bearer", &[])]
        );
        for text in ["", ",,,", "=x", "\"x\"", "ä"] {
            assert_eq!(parsed(text), [], "{text}");
        }
        let many = "a b=c,".repeat(1000);
        assert!(parse_challenges(&many).len() <= MAX_CHALLENGES);
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(text in "\\PC{0,200}") {
            prop_assert!(parse_challenges(&text).len() <= MAX_CHALLENGES);
        }

        #[test]
        fn what_is_quoted_comes_back(values in proptest::collection::vec("[ -~]{0,30}", 1..5)) {
            let quoted: Vec<String> = values
                .iter()
                .map(|value| format!("p=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")))
                .collect();
            let challenges = parse_challenges(&format!("Bearer {}", quoted.join(", ")));
            prop_assert_eq!(challenges.len(), 1);
            let got: Vec<&String> = challenges[0].parameters.iter().map(|(_, value)| value).collect();
            prop_assert_eq!(got, values.iter().collect::<Vec<_>>());
        }
    }
}
