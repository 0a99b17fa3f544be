//! Filters: the small query language of containerd's List calls (`pkg/filters`).
//!
//! ```text
//! filter    = [ selector *( "," selector ) ]           ; all must hold; the empty filter matches everything
//! selector  = path [ operator value ]                  ; without an operator: the field is present
//! path      = field *( "." field )
//! field     = 1*( ALPHA / DIGIT / "_" ) / quoted
//! operator  = "==" / "!=" / "~="                       ; ~= is a regular expression, found anywhere in the field
//! value     = quoted / 1*( any but blank and "," )
//! quoted    = a Go string literal in double quotes; as a value of ~= also between slashes or bars
//! ```
//!
//! Blanks may stand before a token, but not at the end. An absent field counts as the empty text for `!=` and `~=`,
//! and fails `==`.
//!
//! Two things differ from containerd. A regular expression that does not compile is refused here, where containerd
//! accepts the filter and then matches nothing. And an escape may not make a text that is no UTF-8.

use std::borrow::Cow;
use std::str::FromStr;

use regex::bytes::{Regex, RegexBuilder};

use crate::error::{Coded, ErrorCode};
use crate::label::Labels;

/// The most memory that one compiled regular expression may take, in bytes.
const REGEX_SIZE_LIMIT: usize = 1 << 20;

/// What a filter asks of an object.
pub trait Adaptor {
    /// The text of the field at `path`, `None` when the object has no such field or it is unset. The path is never
    /// empty.
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>>;
}

/// The label that the rest of a path names: its parts, joined by dots again, are the key.
pub fn label_field<'a>(labels: &'a Labels, rest: &[String]) -> Option<Cow<'a, str>> {
    let key = match rest {
        [one] => Cow::Borrowed(one.as_str()),
        parts => Cow::Owned(parts.join(".")),
    };
    labels.get(key.as_ref()).map(|value| Cow::Borrowed(value.as_str()))
}

/// A text that counts as absent when it is empty, as most fields of containerd's objects do.
pub fn text_field(text: &str) -> Option<Cow<'_, str>> {
    (!text.is_empty()).then_some(Cow::Borrowed(text))
}

/// A parsed filter: alternatives, of each of which all selectors must hold.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Empty means that everything matches.
    alternatives: Vec<Vec<Selector>>,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// The text breaks the grammar. The message shows the place, as containerd's does.
    #[error("filters: parse error: {}: {reason}: invalid argument", show_place(.input, *.position))]
    Syntax {
        /// The filter.
        input: String,
        /// The byte at which it breaks.
        position: usize,
        /// The rule that is broken.
        reason: String,
    },
    /// A value of `~=` is no regular expression, or one that needs too much memory.
    #[error("filters: invalid regular expression {pattern:?}: {reason}: invalid argument")]
    Regex {
        /// The expression.
        pattern: String,
        /// What the compiler says of it.
        reason: String,
    },
}

impl Coded for FilterError {
    fn code(&self) -> ErrorCode {
        match self {
            FilterError::Syntax { .. } | FilterError::Regex { .. } => ErrorCode::InvalidArgument,
        }
    }
}

fn show_place(input: &str, position: usize) -> String {
    match input.get(position..).and_then(|rest| rest.chars().next()) {
        Some(at) => {
            let (before, after) = (&input[..position], &input[position + at.len_utf8()..]);
            format!("[{before} >|{at}|< {after}]")
        }
        None => format!("[{input}]"),
    }
}

impl Filter {
    /// Parses a list of filters of which one must match. No filter at all, or an empty one, matches everything.
    ///
    /// # Errors
    /// The first text that is no filter.
    pub fn parse(filters: &[String]) -> Result<Filter, FilterError> {
        let mut alternatives = Vec::with_capacity(filters.len());
        for text in filters {
            if !text.is_empty() {
                alternatives.push(Parser { scanner: Scanner::new(text) }.selectors()?);
            }
        }
        if alternatives.len() < filters.len() {
            // One of the alternatives matches everything; the others have been checked and do not matter.
            alternatives.clear();
        }
        Ok(Filter { alternatives })
    }

    /// True when the object is one that the filter selects.
    pub fn matches(&self, object: &dyn Adaptor) -> bool {
        self.alternatives.is_empty()
            || self.alternatives.iter().any(|all| all.iter().all(|selector| selector.matches(object)))
    }

    /// True when every object matches, so that nothing needs to be looked at.
    pub fn matches_everything(&self) -> bool {
        self.alternatives.is_empty()
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Filter, FilterError> {
        Filter::parse(&[text.to_owned()])
    }
}

impl Selector {
    fn matches(&self, object: &dyn Adaptor) -> bool {
        let field = object.field(&self.path);
        let or_empty = || field.as_deref().unwrap_or_default();
        match &self.test {
            Test::Present => field.is_some(),
            Test::Equal(value) => field.as_deref() == Some(value),
            Test::NotEqual(value) => or_empty() != value,
            Test::Matches(regex) => regex.is_match(or_empty().as_bytes()),
        }
    }
}

/// Compiles an expression with the meaning that it has in Go's RE2.
fn compile(pattern: &str) -> Result<Regex, FilterError> {
    // In RE2 `\d`, `\w`, `\s` and `\b` know ASCII only, which is what Unicode mode would change. It is needed only
    // where the pattern itself has other letters, so that a class of them holds characters and not bytes.
    RegexBuilder::new(pattern)
        .unicode(!pattern.is_ascii())
        .size_limit(REGEX_SIZE_LIMIT)
        .dfa_size_limit(REGEX_SIZE_LIMIT)
        .build()
        .map_err(|error| FilterError::Regex { pattern: pattern.to_owned(), reason: error.to_string() })
}

struct Parser<'a> {
    scanner: Scanner<'a>,
}

impl Parser<'_> {
    fn selectors(&mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.scanner.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.scanner.scan()?;
                    selectors.push(self.selector()?);
                }
                Some(other) => {
                    return Err(self.scanner.error(self.scanner.next, format!("unexpected input: {other}")));
                }
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let path = self.path()?;
        if matches!(self.scanner.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        let token = self.scanner.scan()?;
        let operator = token.text.to_owned();
        if token.kind != Kind::Operator {
            let reason = r#"expected an operator ("=="|"!="|"~=")"#;
            return Err(self.scanner.error(token.start, reason.to_owned()));
        }
        if !matches!(operator.as_str(), "==" | "!=" | "~=") {
            return Err(self.scanner.error(token.start, format!("unsupported operator {operator:?}")));
        }
        let value = self.value(operator == "~=")?;
        let test = match operator.as_str() {
            "==" => Test::Equal(value),
            "!=" => Test::NotEqual(value),
            _ => Test::Matches(compile(&value)?),
        };
        Ok(Selector { path, test })
    }

    fn path(&mut self) -> Result<Vec<String>, FilterError> {
        let mut path = vec![self.field()?];
        while self.scanner.peek() == Some('.') {
            self.scanner.scan()?;
            path.push(self.field()?);
        }
        Ok(path)
    }

    fn field(&mut self) -> Result<String, FilterError> {
        let token = self.scanner.scan()?;
        match token.kind {
            Kind::Field => Ok(token.text.to_owned()),
            Kind::Quoted => self.unquote(token, false),
            Kind::Value | Kind::Separator | Kind::Operator | Kind::Other | Kind::End => {
                Err(self.scanner.error(token.start, "expected field or quoted".to_owned()))
            }
        }
    }

    fn value(&mut self, alternative_quotes: bool) -> Result<String, FilterError> {
        let token = self.scanner.scan()?;
        match token.kind {
            Kind::Value | Kind::Field => Ok(token.text.to_owned()),
            Kind::Quoted => self.unquote(token, alternative_quotes),
            Kind::Separator | Kind::Operator | Kind::Other | Kind::End => {
                Err(self.scanner.error(token.start, "expected value or quoted".to_owned()))
            }
        }
    }

    fn unquote(&self, token: Token<'_>, alternative_quotes: bool) -> Result<String, FilterError> {
        if !alternative_quotes && !token.text.starts_with('"') {
            return Err(self.scanner.error(token.start, "invalid quote encountered".to_owned()));
        }
        unquote(token.text)
            .ok_or_else(|| self.scanner.error(token.start, "unquoting failed: quote syntax error".to_owned()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Field,
    Value,
    Quoted,
    Separator,
    Operator,
    Other,
    End,
}

#[derive(Debug, Clone, Copy)]
struct Token<'a> {
    kind: Kind,
    start: usize,
    text: &'a str,
}

/// Cuts the input into tokens. What a run of letters is depends on what came before: after an operator it is a
/// value, which may hold nearly anything.
struct Scanner<'a> {
    input: &'a str,
    next: usize,
    value: bool,
}

impl<'a> Scanner<'a> {
    fn new(input: &'a str) -> Scanner<'a> {
        Scanner { input, next: 0, value: false }
    }

    fn error(&self, position: usize, reason: String) -> FilterError {
        FilterError::Syntax { input: self.input.to_owned(), position, reason }
    }

    fn peek(&self) -> Option<char> {
        self.input[self.next..].chars().next()
    }

    fn advance_while(&mut self, accept: impl Fn(char) -> bool) {
        let rest = &self.input[self.next..];
        self.next += rest.find(|c| !accept(c)).unwrap_or(rest.len());
    }

    fn scan(&mut self) -> Result<Token<'a>, FilterError> {
        self.advance_while(char::is_whitespace);
        let start = self.next;
        let Some(first) = self.peek() else { return Ok(self.token(Kind::End, start)) };
        self.next += first.len_utf8();
        match first {
            '\0' => Err(self.error(start, "unexpected null".to_owned())),
            char::REPLACEMENT_CHARACTER => Err(self.error(start, "rune error".to_owned())),
            '/' | '|' | '"' => {
                self.quoted(first, start)?;
                Ok(self.token(Kind::Quoted, start))
            }
            ',' | '.' => {
                self.value = false;
                Ok(self.token(Kind::Separator, start))
            }
            '=' | '!' | '~' => {
                self.advance_while(|c| matches!(c, '=' | '!' | '~'));
                self.value = true;
                Ok(self.token(Kind::Operator, start))
            }
            _ if self.value => {
                self.advance_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                self.value = false;
                Ok(self.token(Kind::Value, start))
            }
            _ if is_field(first) => {
                self.advance_while(is_field);
                Ok(self.token(Kind::Field, start))
            }
            _ => Ok(self.token(Kind::Other, start)),
        }
    }

    fn token(&self, kind: Kind, start: usize) -> Token<'a> {
        Token { kind, start, text: &self.input[start..self.next] }
    }

    /// Passes over the rest of a quoted text, its closing quote included.
    fn quoted(&mut self, quote: char, start: usize) -> Result<(), FilterError> {
        loop {
            let Some(c) = self.peek().filter(|c| !matches!(*c, '\n' | '\0' | char::REPLACEMENT_CHARACTER))
            else {
                return Err(self.error(start, "quoted literal not terminated".to_owned()));
            };
            self.next += c.len_utf8();
            if c == quote {
                return Ok(());
            }
            if c == '\\' {
                self.escape(quote, start)?;
            }
        }
    }

    /// Passes over what follows a backslash.
    fn escape(&mut self, quote: char, start: usize) -> Result<(), FilterError> {
        let letter = self.peek();
        let (base, digits) = match letter {
            Some(c @ ('a' | 'b' | 'f' | 'n' | 'r' | 't' | 'v' | '\\')) => {
                self.next += c.len_utf8();
                return Ok(());
            }
            Some(c) if c == quote => {
                self.next += c.len_utf8();
                return Ok(());
            }
            Some('0'..='7') => (8, 3),
            Some('x') => (16, 2),
            Some('u') => (16, 4),
            Some('U') => (16, 8),
            Some(_) | None => return Err(self.error(start, "illegal escape sequence".to_owned())),
        };
        if base == 16 {
            self.next += 1;
        }
        for _ in 0..digits {
            if !self.peek().is_some_and(|c| c.is_digit(base)) {
                return Err(self.error(start, "illegal numeric escape sequence".to_owned()));
            }
            self.next += 1;
        }
        Ok(())
    }
}

fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// The text of a quoted token whose escapes the scanner has passed; `None` when an escape stands for no text.
fn unquote(token: &str) -> Option<String> {
    let mut rest = token.get(1..token.len().checked_sub(1)?)?;
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some((before, after)) = rest.split_once('\\') {
        bytes.extend_from_slice(before.as_bytes());
        let letter = after.chars().next()?;
        let mut length = letter.len_utf8();
        let mut digits = |from: usize, count: usize, radix: u32| {
            length = from + count;
            u32::from_str_radix(after.get(from..length)?, radix).ok()
        };
        match letter {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            // These two name a byte, which need not be a whole character.
            '0'..='7' => bytes.push(u8::try_from(digits(0, 3, 8)?).ok()?),
            'x' => bytes.push(u8::try_from(digits(1, 2, 16)?).ok()?),
            'u' | 'U' => {
                let character = char::from_u32(digits(1, if letter == 'u' { 4 } else { 8 }, 16)?)?;
                bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            }
            other => bytes.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
        rest = after.get(length..)?;
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Object {
        name: &'static str,
        other: &'static str,
        labels: Labels,
    }

    impl Adaptor for Object {
        fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
            match path[0].as_str() {
                "name" => text_field(self.name),
                "other" => text_field(self.other),
                "labels" => label_field(&self.labels, &path[1..]),
                _ => None,
            }
        }
    }

    fn object(name: &'static str, other: &'static str, labels: &[(&str, &str)]) -> Object {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Object { name, other, labels }
    }

    fn objects() -> Vec<Object> {
        vec![
            object("web", "", &[("app", "true")]),
            object("db", "", &[]),
            object("web", "", &[("app", "yes"), ("a key with blanks", "1")]),
            object("cache", "one, two", &[("a \\ and a \" in it.end", "1")]),
            object("mixed", "abc", &[("app", "x_y.z-1"), ("io.k8s/pod.name", "p")]),
        ]
    }

    fn selected(filter: &str) -> Vec<usize> {
        let filter: Filter = filter.parse().unwrap();
        let objects = objects();
        (0..objects.len()).filter(|&index| filter.matches(&objects[index])).collect()
    }

    #[test]
    fn selects_what_the_grammar_says() {
        let table: &[(&str, &[usize])] = &[
            ("", &[0, 1, 2, 3, 4]),
            ("name", &[0, 1, 2, 3, 4]),
            ("absent", &[]),
            ("labels.app", &[0, 2, 4]),
            ("labels.app,name", &[0, 2, 4]),
            ("labels.app, name==web", &[0, 2]),
            ("  name == web", &[0, 2]),
            ("name==web,labels.app==true", &[0]),
            ("name==web,labels.app==wrong", &[]),
            ("labels.app==x_y.z-1", &[4]),
            ("name!=web", &[1, 3, 4]),
            ("labels.app!=true", &[1, 2, 3, 4]),
            ("labels.absent!=\"\"", &[]),
            ("labels.absent~=^$", &[0, 1, 2, 3, 4]),
            ("other==\"one, two\"", &[3]),
            ("other~=[bc]+", &[4]),
            ("other~=/^[a-c]{1,3}$/", &[4]),
            ("other~=|one, t|", &[3]),
            ("other~=/[abc]{0,1}\"\\//", &[]),
            (r#"labels."a key with blanks""#, &[2]),
            (r#"labels."a \\ and a \" in it".end==1"#, &[3]),
            (r#"labels."io.k8s/pod.name"==p"#, &[4]),
            (r#"labels.io."k8s/pod".name==p"#, &[4]),
            (r#"name=="\167\x65\u0062""#, &[0, 2]),
            (r#"name~="(?i)^WEB$""#, &[0, 2]),
            (r#"name~=/^\\w+$/"#, &[0, 1, 2, 3, 4]),
            (r"name~=^\w+$", &[0, 1, 2, 3, 4]),
        ];
        for (filter, want) in table {
            assert_eq!(selected(filter), *want, "{filter}");
        }
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let table = [
            ("labels.|a|==b", "[labels. >|||< a|==b]: invalid quote encountered"),
            (r#"labels.?"a""#, r#"[labels. >|?|< "a"]: expected field or quoted"#),
            ("name==a,", "[name==a,]: expected field or quoted"),
            ("labels.", "[labels.]: expected field or quoted"),
            ("image~=,id?=?b", "[image~= >|,|< id?=?b]: expected value or quoted"),
            ("labels.ns/key==v", "[labels.ns >|/|< key==v]: quoted literal not terminated"),
            ("labels.key==/value", "[labels.key== >|/|< value]: quoted literal not terminated"),
            ("name===a", "[name >|=|< ==a]: unsupported operator \"===\""),
            ("name a", "[name  >|a|< ]: expected an operator (\"==\"|\"!=\"|\"~=\")"),
            ("name==a ", "[name==a >| |< ]: unexpected input:  "),
            ("name==", "[name==]: expected value or quoted"),
            ("näme", "[n >|ä|< me]: expected an operator (\"==\"|\"!=\"|\"~=\")"),
            (r"name~=/\d/", r"[name~= >|/|< \d/]: illegal escape sequence"),
            (r#"name=="\xff""#, r#"[name== >|"|< \xff"]: unquoting failed: quote syntax error"#),
            (r#"name=="\ud800""#, r#"[name== >|"|< \ud800"]: unquoting failed: quote syntax error"#),
        ];
        for (filter, want) in table {
            let error = filter.parse::<Filter>().unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("filters: parse error: {want}: invalid argument"),
                "{filter}"
            );
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
        }
        for pattern in ["name~=[", "name~=(a", "name~=(((a{1000}){1000}){1000})"] {
            assert!(matches!(pattern.parse::<Filter>(), Err(FilterError::Regex { .. })), "{pattern}");
        }
    }

    #[test]
    fn several_filters_are_alternatives() {
        let parse = |filters: &[&str]| {
            Filter::parse(&filters.iter().map(|filter| (*filter).to_owned()).collect::<Vec<_>>())
        };
        let db = object("db", "", &[]);
        assert!(parse(&["name==web", "name==db"]).unwrap().matches(&db));
        assert!(!parse(&["name==web", "other"]).unwrap().matches(&db));
        assert!(parse(&[]).unwrap().matches(&db));
        assert!(parse(&["name==web", ""]).unwrap().matches(&db));
        assert!(parse(&["", "name="]).is_err());
    }

    #[test]
    fn character_classes_know_ascii_as_in_re2() {
        let arabic = object("٣", "", &[]);
        let matches = |filter: &str| filter.parse::<Filter>().unwrap().matches(&arabic);
        assert!(!matches(r"name~=\d"));
        assert!(matches(r"name~=[٣٤]"));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,40}|[a-c.,=!~\"/|\\\\xuU0-9 \\n\\x00]{0,24}") {
            if let Ok(filter) = text.parse::<Filter>() {
                filter.matches(&object("a", "b", &[("a", "b")]));
            }
        }

        #[test]
        fn a_quoted_text_is_itself(name in "[^\\x00\\n\u{fffd}]{0,16}") {
            let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
            let filter: Filter = format!("labels.\"{quoted}\"==\"{quoted}\"").parse().unwrap();
            let labels = Labels::from([(name.clone(), name)]);
            let holder = Object { name: "", other: "", labels };
            prop_assert!(filter.matches(&holder));
        }
    }
}
