//! What the daemon logs, and how much of it, which may change while it runs.

use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::config::{Config, LogFormat};
use crate::trace;

/// Why logs are not as somebody wants them.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// A word that is no level.
    #[error("{text:?} is none of trace, debug, info, warn, error, and no filter with `=`")]
    Level {
        /// What was given.
        text: String,
    },
    /// No filter.
    #[error("{text:?} is no filter")]
    Filter {
        /// What was given.
        text: String,
        /// Why not.
        source: ParseError,
    },
    /// The logs have begun already.
    #[error("the logs have begun already")]
    Begun,
    /// Nobody logs any more.
    #[error("the logs have ended")]
    Ended {
        /// Why.
        source: reload::Error,
    },
}

/// The logs of this process; a handle.
#[derive(Clone)]
pub struct Logs {
    filter: Handle<EnvFilter, Registry>,
    level: Arc<Mutex<String>>,
    #[cfg(feature = "otel")]
    sender: Option<trace::Sender>,
}

impl Logs {
    /// Begins to log on standard error, and to send spans if that is wanted. Must be called in a runtime.
    ///
    /// # Errors
    /// [`LogsError::Level`] and [`LogsError::Filter`] for a level that is none; the logs of a process can begin once.
    pub fn start(config: &Config) -> Result<Logs, LogsError> {
        let level = &config.log.level;
        let (filter, handle) = reload::Layer::new(filter(level)?);
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let lines = match config.log.format {
            LogFormat::Text => lines.with_ansi(false).with_filter(filter).boxed(),
            LogFormat::Json => lines.json().with_filter(filter).boxed(),
        };
        let registry = tracing_subscriber::registry().with(lines);
        #[cfg(feature = "otel")]
        let sender = match trace::is_wanted(config) {
            true => trace::Sender::start(&config.tracing),
            false => Ok(None),
        };
        #[cfg(feature = "otel")]
        let registry = registry.with(trace::layer(sender.as_ref().ok().and_then(Option::as_ref)));
        registry.try_init().map_err(|_| LogsError::Begun)?;
        trace::warn_if_deaf(config);
        Ok(Logs {
            filter: handle,
            level: Arc::new(Mutex::new(level.clone())),
            // As with containerd: without its spans a daemon is as good as with them.
            #[cfg(feature = "otel")]
            sender: sender.unwrap_or_else(|error| {
                tracing::warn!(error = davit_model::error::chain(&error), "no spans are sent");
                None
            }),
        })
    }

    /// Sends the last spans. Blocks for a moment, and must not be called in a runtime, which must still be there.
    pub fn end(self) {
        #[cfg(feature = "otel")]
        if let Some(sender) = self.sender {
            sender.end();
        }
    }

    /// The level or filter in force.
    pub fn level(&self) -> String {
        self.level.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs more, or less, from now on.
    ///
    /// # Errors
    /// [`LogsError::Level`] and [`LogsError::Filter`], and nothing has changed.
    pub fn set_level(&self, level: &str) -> Result<(), LogsError> {
        let filter = filter(level)?;
        let mut told = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        self.filter.reload(filter).map_err(|source| LogsError::Ended { source })?;
        *told = level.to_owned();
        Ok(())
    }
}

/// Whether a level or filter asks for anything below the usual.
pub(crate) fn is_verbose(level: &str) -> bool {
    filter(level).is_ok_and(|filter| filter.max_level_hint() >= Some(LevelFilter::DEBUG))
}

/// A bare level is about us; what the libraries say below a warning is for who asks for it by name.
pub(crate) fn filter(level: &str) -> Result<EnvFilter, LogsError> {
    let text = match level.parse::<LevelFilter>() {
        // To its parser nothing at all is a level, too.
        Ok(filter) if !level.is_empty() => format!("warn,davit={filter}"),
        _ if level.contains('=') => level.to_owned(),
        // It would be a filter for a module of that name, and silence all others.
        _ => return Err(LogsError::Level { text: level.to_owned() }),
    };
    EnvFilter::try_new(&text).map_err(|source| LogsError::Filter { text, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_about_us_and_a_filter_about_what_it_names() {
        assert_eq!(filter("debug").unwrap().to_string(), "davit=debug,warn");
        assert_eq!(
            filter("info,davit_supervisor::runtime=trace").unwrap().to_string().matches('=').count(),
            1
        );
        for bad in ["loud", "", "davit=loud"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
        for (level, verbose) in
            [("debug", true), ("trace", true), ("info,davit=trace", true), ("info", false)]
        {
            assert_eq!(is_verbose(level), verbose, "{level}");
        }
    }
}
