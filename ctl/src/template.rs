//! `--format`: as much of Go's text/template as people write on command lines.
//!
//! | format | output |
//! |---|---|
//! | `json` | each object as a line of JSON |
//! | `{{.State.Pid}} is {{.Name}}` | the text, with fields in place of the actions, and a newline |
//! | `table {{.ID}}\t{{.Names}}` | a table with a heading |
//!
//! In an action stand a field, or a function and its arguments: `json`, `lower`, `upper`, `len` of one, `join LIST "SEPARATOR"`,
//! `index MAP "KEY"`; `{{.A | json}}` is `{{json .A}}`. Loops and conditions are for programs, which read JSON.

use std::io::Write;
use std::str::FromStr;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::format;
use crate::table::Table;

const HINT: &str = "want json, or text with fields such as {{.ID}} or {{json .Labels}} (table before it makes a table); for more, \
                    have json and let a program read it";

/// How objects are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Format {
    /// As JSON, one in a line.
    Json,
    /// By a template.
    Text(Template),
    /// By a template whose tabs end columns.
    Table(Template),
}

/// A text with gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// Each but the first takes what the one before it gives as its last argument.
    Pipeline(Vec<Command>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Command {
    function: Option<Function>,
    arguments: Vec<Argument>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    Json,
    Lower,
    Upper,
    Len,
    Join,
    Index,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Argument {
    /// `.A.B`; no name stands for the object itself.
    Field(Vec<String>),
    Text(String),
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Format, String> {
        if text == "json" {
            return Ok(Format::Json);
        }
        match text.strip_prefix("table") {
            Some(rest) if rest.starts_with([' ', '\t']) => {
                Template::parse(rest.trim_start()).map(Format::Table)
            }
            _ => Template::parse(text).map(Format::Text),
        }
    }
}

impl Format {
    /// Shows one object, if it is not one of a table.
    ///
    /// # Errors
    /// It has not all that is asked for.
    pub(crate) fn show(&self, object: &Value) -> Result<String> {
        match self {
            Format::Json => Ok(object.to_string()),
            Format::Text(template) | Format::Table(template) => template.fill(object),
        }
    }

    /// Writes a list. `headings` has what stands above the fields of a table.
    ///
    /// # Errors
    /// An object has not all that is asked for, or the output fails.
    pub(crate) fn write(&self, objects: &[Value], headings: &Value, out: &mut dyn Write) -> Result<()> {
        let Format::Table(template) = self else {
            return objects.iter().try_for_each(|object| format::line(out, self.show(object)?));
        };
        let cells = |text: &str| text.split('\t').map(str::to_owned).collect::<Vec<String>>();
        let heading = cells(&template.fill(headings)?);
        let mut table = Table::new(&heading.iter().map(String::as_str).collect::<Vec<_>>());
        for object in objects {
            table.row(cells(&template.fill(object)?));
        }
        table.write(out).map_err(Error::Output)
    }
}

impl Template {
    fn parse(text: &str) -> std::result::Result<Template, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (action, behind) =
                after.split_once("}}").ok_or_else(|| format!("{{{{ without }}}}; {HINT}"))?;
            parts.push(Part::Text(unescape(before)));
            parts.push(Part::Pipeline(pipeline(action)?));
            rest = behind;
        }
        parts.push(Part::Text(unescape(rest)));
        parts.retain(|part| *part != Part::Text(String::new()));
        if parts.is_empty() { Err(format!("the format is empty; {HINT}")) } else { Ok(Template(parts)) }
    }

    fn fill(&self, object: &Value) -> Result<String> {
        let mut text = String::new();
        for part in &self.0 {
            match part {
                Part::Text(words) => text.push_str(words),
                Part::Pipeline(commands) => {
                    let mut value = None;
                    for command in commands {
                        value = Some(command.run(object, value)?);
                    }
                    print(&value.unwrap_or_default(), &mut text);
                }
            }
        }
        Ok(text)
    }
}

/// The two escapes that Docker knows.
fn unescape(text: &str) -> String {
    text.replace("\\t", "\t").replace("\\n", "\n")
}

fn pipeline(action: &str) -> std::result::Result<Vec<Command>, String> {
    let invalid = || format!("cannot understand {{{{{action}}}}}; {HINT}");
    let mut commands = vec![Command { function: None, arguments: Vec::new() }];
    let mut rest = action.trim();
    while !rest.is_empty() {
        let command = commands.last_mut().expect("there is one from the beginning");
        if let Some(behind) = rest.strip_prefix('|') {
            commands.push(Command { function: None, arguments: Vec::new() });
            rest = behind.trim_start();
            continue;
        }
        if let Some(quoted) = rest.strip_prefix('"') {
            let (text, behind) = quoted.split_once('"').ok_or_else(invalid)?;
            command.arguments.push(Argument::Text(unescape(text)));
            rest = behind.trim_start();
            continue;
        }
        let end = rest.find([' ', '\t', '|', '"']).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        if let Some(path) = word.strip_prefix('.') {
            let names: Vec<String> = path.split('.').map(str::to_owned).collect();
            let whole = path.is_empty();
            if !whole && names.iter().any(String::is_empty) {
                return Err(invalid());
            }
            command.arguments.push(Argument::Field(if whole { Vec::new() } else { names }));
        } else if command.function.is_none() && command.arguments.is_empty() {
            command.function = Some(match word {
                "json" => Function::Json,
                "lower" => Function::Lower,
                "upper" => Function::Upper,
                "len" => Function::Len,
                "join" => Function::Join,
                "index" => Function::Index,
                _ => return Err(invalid()),
            });
        } else {
            return Err(invalid());
        }
        rest = behind.trim_start();
    }
    for (index, command) in commands.iter().enumerate() {
        let given = command.arguments.len() + usize::from(index > 0);
        let wanted = match command.function {
            None => 1,
            Some(Function::Join | Function::Index) => 2,
            Some(_) => 1,
        };
        if given != wanted || index > 0 && command.function.is_none() {
            return Err(invalid());
        }
    }
    Ok(commands)
}

impl Command {
    fn run(&self, object: &Value, piped: Option<Value>) -> Result<Value> {
        let mut arguments = Vec::new();
        for argument in &self.arguments {
            arguments.push(match argument {
                Argument::Text(text) => Value::from(text.as_str()),
                Argument::Field(names) => field(object, names)?,
            });
        }
        arguments.extend(piped);
        let text = |value: &Value| {
            let mut text = String::new();
            print(value, &mut text);
            text
        };
        let wrong = |what: &str| Error::usage(format!("cannot show it so: {what}"), HINT);
        Ok(match (self.function, arguments.as_slice()) {
            (None, [value]) => value.clone(),
            (Some(Function::Json), [value]) => Value::from(value.to_string()),
            (Some(Function::Lower), [value]) => Value::from(text(value).to_lowercase()),
            (Some(Function::Upper), [value]) => Value::from(text(value).to_uppercase()),
            (Some(Function::Len), [Value::Array(items)]) => Value::from(items.len()),
            (Some(Function::Len), [Value::Object(fields)]) => Value::from(fields.len()),
            (Some(Function::Len), [value]) => Value::from(text(value).len()),
            (Some(Function::Join), [Value::Array(items), separator]) => {
                Value::from(items.iter().map(text).collect::<Vec<_>>().join(&text(separator)))
            }
            (Some(Function::Join), _) => return Err(wrong("join is for lists")),
            (Some(Function::Index), [Value::Object(fields), key]) => {
                fields.get(&text(key)).cloned().unwrap_or_default()
            }
            (Some(Function::Index), [Value::Array(items), key]) => text(key)
                .parse::<usize>()
                .ok()
                .and_then(|index| items.get(index))
                .cloned()
                .unwrap_or_default(),
            _ => return Err(wrong("index is for maps and lists")),
        })
    }
}

/// # Errors
/// The object has no such field; the hint names those that it has.
fn field(object: &Value, names: &[String]) -> Result<Value> {
    let mut value = object;
    for name in names {
        value = value.get(name).ok_or_else(|| {
            let known: Vec<&str> =
                value.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
            let hint = match known.as_slice() {
                [] => "there are no fields in it".to_owned(),
                known => format!("there are: {}", known.join(", ")),
            };
            Error::usage(format!("no field {name:?}"), hint)
        })?;
    }
    Ok(value.clone())
}

/// As Go's `fmt` prints it. Control characters, which may come from an image, cannot steer a terminal.
fn print(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("<no value>"),
        Value::String(text) => {
            out.extend(
                text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '?' } else { c }),
            );
        }
        Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                print(item, out);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            out.push_str("map[");
            for (index, (key, item)) in fields.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                out.push_str(key);
                out.push(':');
                print(item, out);
            }
            out.push(']');
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn show(template: &str, object: &Value) -> String {
        template.parse::<Format>().unwrap().show(object).unwrap()
    }

    #[test]
    fn what_people_write() {
        let object = json!({
            "Id": "abc", "State": {"Pid": 7, "Running": true}, "Args": ["-f", "x y"], "None": null,
            "Labels": {"a.b": "c", "d": "e"}, "Name": "Web",
        });
        for (template, want) in [
            ("{{.State.Pid}}", "7"),
            ("{{ .Name }}: {{.State.Running}}\\n", "Web: true\n"),
            ("{{json .State}}", r#"{"Pid":7,"Running":true}"#),
            ("{{.Args}} {{.Labels}}", "[-f x y] map[a.b:c d:e]"),
            (r#"{{index .Labels "a.b"}} {{index .Labels "x"}}"#, "c <no value>"),
            (r#"{{join .Args ", "}}"#, "-f, x y"),
            ("{{lower .Name}}{{upper .Name}}{{len .Args}}{{len .Name}}", "webWEB23"),
            ("{{.Labels | json}}", r#"{"a.b":"c","d":"e"}"#),
            ("{{.Name | upper | json}}", r#""WEB""#),
            ("{{.None}}", "<no value>"),
            ("no fields", "no fields"),
        ] {
            assert_eq!(show(template, &object), want, "{template}");
        }
        assert_eq!(show("json", &json!({"b": 1, "a": 2})), json!({"a": 2, "b": 1}).to_string());
        assert_eq!(show("{{.}}", &json!("whole")), "whole");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            "",
            "{{",
            "{{}}",
            "{{nope .A}}",
            "{{range .A}}x{{end}}",
            "{{.A .B}}",
            "{{json}}",
            "{{join .A}}",
            "{{..A}}",
            "{{index .A \"b}}",
            "{{.A | .B}}",
            "{{.A |}}",
        ] {
            assert!(bad.parse::<Format>().is_err(), "{bad}");
        }
        let missing = "{{.Nope}}".parse::<Format>().unwrap().show(&json!({"Id": 1})).unwrap_err();
        assert!(missing.report().contains("there are: Id"), "{}", missing.report());
        assert!("{{join .Id \",\"}}".parse::<Format>().unwrap().show(&json!({"Id": 1})).is_err());
    }

    #[test]
    fn a_table_has_a_heading_and_no_control_characters() {
        let format: Format = "table {{.ID}}\\t{{.Names}}".parse().unwrap();
        let mut out = Vec::new();
        let rows = [json!({"ID": "1", "Names": "a\u{1b}[2J"}), json!({"ID": "22", "Names": "b"})];
        format.write(&rows, &json!({"ID": "CONTAINER ID", "Names": "NAMES"}), &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "CONTAINER ID   NAMES\n1              a?[2J\n22             b\n"
        );
        assert_eq!(show("{{.A}}", &json!({"A": "x\u{1b}y\tz"})), "x?y\tz");
    }
}
