//! Filters as data: what a client writes, and what it must find.

use std::fmt::Write;

use serde_json::Value;

/// Filters of which one must match, each of selectors that all must hold; none at all match everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filters(pub Vec<Filter>);

/// One filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// Selectors, all of which must hold; none hold always.
    All(Vec<Selector>),
    /// A text that is no filter.
    Malformed(&'static str),
}

/// One selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    /// The field. Of labels the rest is the key.
    pub path: Vec<String>,
    /// What is asked of it.
    pub test: Test,
}

/// What a selector asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    /// The field is there.
    Present,
    /// It has this value.
    Equal(String),
    /// It has another value, or none.
    NotEqual(String),
    /// Its value, or the empty text, matches a regular expression that is found anywhere: this text.
    Contains(String),
    /// The same: `^` and this text.
    Begins(String),
}

impl Filters {
    /// The texts that go over the wire.
    pub fn texts(&self) -> Vec<String> {
        self.0.iter().map(Filter::text).collect()
    }

    /// Whether all of them are filters.
    pub fn are_valid(&self) -> bool {
        self.0.iter().all(|filter| matches!(filter, Filter::All(_)))
    }

    /// Whether an object matches; `field` gives the value at a path if it is there.
    pub fn match_by(&self, field: impl Fn(&[String]) -> Option<String>, absent_differs: bool) -> bool {
        let holds = |selector: &Selector| {
            let value = field(&selector.path);
            let text = value.clone().unwrap_or_default();
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value.as_ref() == Some(wanted),
                Test::NotEqual(other) => text != *other && (absent_differs || value.is_some()),
                Test::Contains(part) => text.contains(part),
                Test::Begins(part) => text.starts_with(part),
            }
        };
        let matches = |filter: &Filter| match filter {
            Filter::All(selectors) => selectors.iter().all(holds),
            Filter::Malformed(_) => false,
        };
        self.0.is_empty() || self.0.iter().any(matches)
    }
}

impl Filter {
    fn text(&self) -> String {
        match self {
            Filter::Malformed(text) => (*text).to_owned(),
            Filter::All(selectors) => {
                let texts: Vec<String> = selectors.iter().map(Selector::text).collect();
                // Clients of containerd write it with a blank as well.
                texts.join(if texts.len() == 2 { ", " } else { "," })
            }
        }
    }
}

impl Selector {
    fn text(&self) -> String {
        let plain = |text: &str| {
            !text.is_empty() && text.chars().all(|char| char.is_ascii_alphanumeric() || char == '_')
        };
        let mut text = String::new();
        for (at, field) in self.path.iter().enumerate() {
            text.push_str(if at > 0 { "." } else { "" });
            let _ = if plain(field) { write!(text, "{field}") } else { write!(text, "{field:?}") };
        }
        let (operator, value) = match &self.test {
            Test::Present => return text,
            Test::Equal(value) => ("==", value.clone()),
            Test::NotEqual(value) => ("!=", value.clone()),
            Test::Contains(value) => ("~=", value.clone()),
            Test::Begins(value) => ("~=", format!("^{value}")),
        };
        match (operator, plain(&value)) {
            ("~=", false) => text + operator + "|" + &value + "|",
            (_, true) => text + operator + &value,
            (_, false) => format!("{text}{operator}{value:?}"),
        }
    }
}

/// The value of a field of an object in the form of `wire.rs`, if it is there.
pub fn field(record: &Value, path: &[String]) -> Option<String> {
    let first = path.first()?.as_str();
    if first == "labels" || first == "annotations" {
        let key = path[1..].join(".");
        return record[first].get(key)?.as_str().map(str::to_owned);
    }
    let value = path.iter().try_fold(record, |value, part| value.get(part))?.as_str()?;
    // Of a snapshot without a parent the parent counts as there.
    (!value.is_empty() || first == "parent").then(|| value.to_owned())
}
