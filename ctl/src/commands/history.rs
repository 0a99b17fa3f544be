//! `davit history`: what an image was made by, the last step first.

use std::io::Write;
use std::time::SystemTime;

use davit_oci::platform::Platform;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::images;
use crate::error::{Error, Result};
use crate::template::Format;
use crate::unpack::Snapshotter;
use crate::{format, image};

/// The characters of a step that are shown.
const STEP_LENGTH: usize = 45;

const TABLE: &str = "table {{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}";

/// Options of `davit history`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  davit history busybox\n  davit history --no-trunc --format '{{.Size}}: {{.CreatedBy}}' busybox\n\
                        Fields: ID, CreatedAt, CreatedSince, CreatedBy, Size, Comment."
)]
pub(crate) struct Options {
    /// Do not shorten anything
    #[arg(long)]
    no_trunc: bool,
    /// Show each by a template of Go's, or as json
    #[arg(long, value_name = "FORMAT", default_value = TABLE, hide_default_value = true)]
    format: Format,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// The image, by name or id
    image: String,
}

/// The part of an image's configuration that says how it was made. Others than Docker leave any of it out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Made {
    history: Vec<Step>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Step {
    created: Option<String>,
    created_by: String,
    comment: String,
    empty_layer: bool,
}

/// `davit history`.
pub(crate) async fn run(client: &Client, options: Options, out: &mut dyn Write) -> Result<()> {
    let image = image::find(client, &options.image).await?;
    let target = image::target(&image)?;
    let found = image::for_platform(client, &target, &Platform::host()).await?;
    let config = image::read_document(client, &found.manifest.config).await?;
    let unreadable = |source| {
        let id = format::short_id(target.digest.as_str()).to_owned();
        Error::Stored { what: "the history", id, source }
    };
    let made: Made = serde_json::from_slice(&config).map_err(unreadable)?;
    let sizes = images::layer_sizes(client, &found, &options.snapshotter.name).await;
    let id = if options.no_trunc { target.digest.as_str() } else { format::short_id(target.digest.as_str()) };
    let rows = rows(&made.history, &sizes, id, options.no_trunc, SystemTime::now());
    let headings = json!({
        "ID": "IMAGE", "CreatedAt": "CREATED AT", "CreatedSince": "CREATED", "CreatedBy": "CREATED BY", "Size": "SIZE",
        "Comment": "COMMENT",
    });
    options.format.write(&rows, &headings, out)
}

/// A row for each step. Layers that no step tells of, as in images that were made from one tar, are steps of their own.
fn rows(history: &[Step], sizes: &[u64], id: &str, whole: bool, now: SystemTime) -> Vec<Value> {
    let mut layers = sizes.iter().copied();
    let mut rows = Vec::new();
    let mut row = |step: &Step, size: u64| {
        let created = step.created.as_deref().and_then(format::parse_rfc3339);
        let length = if whole { usize::MAX } else { STEP_LENGTH };
        rows.push(json!({
            "ID": "<missing>",
            "CreatedAt": created.map(format::rfc3339).unwrap_or_default(),
            "CreatedSince": created.map_or_else(|| "N/A".to_owned(), |time| format::ago(time, now)),
            "CreatedBy": format::ellipsis(&step.created_by, length),
            "Size": format::decimal_size(size),
            "Comment": step.comment,
        }));
    };
    for step in history {
        let size = if step.empty_layer { 0 } else { layers.next().unwrap_or(0) };
        row(step, size);
    }
    for size in layers {
        row(&Step::default(), size);
    }
    rows.reverse();
    // Only of the last step the result is there.
    if let Some(last) = rows.first_mut() {
        last["ID"] = json!(id);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_the_sizes_of_their_layers() {
        let text = r#"{"history": [
            {"created": "2024-01-01T00:00:00Z", "created_by": "ADD a"},
            {"created_by": "ENV b", "empty_layer": true},
            {"created_by": "RUN c", "comment": "buildkit"}]}"#;
        let made: Made = serde_json::from_str(text).unwrap();
        let now = format::parse_rfc3339("2024-01-01T00:00:08Z").unwrap();
        let rows = rows(&made.history, &[1000, 20, 3], "abc", false, now);
        let shown: Vec<String> = rows
            .iter()
            .map(|row| {
                [&row["ID"], &row["CreatedBy"], &row["Size"], &row["CreatedSince"]]
                    .map(|v| v.as_str().unwrap())
                    .join(",")
            })
            .collect();
        assert_eq!(
            shown,
            [
                "abc,,3B,N/A",
                "<missing>,RUN c,20B,N/A",
                "<missing>,ENV b,0B,N/A",
                "<missing>,ADD a,1kB,8 seconds ago"
            ]
        );
        let none: Made = serde_json::from_str("{}").unwrap();
        assert!(super::rows(&none.history, &[], "abc", false, now).is_empty());
    }
}
