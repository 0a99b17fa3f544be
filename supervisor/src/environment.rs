//! What of the daemon's environment is not for the programs that it starts.

/// What systemd tells the daemon.
const OF_SYSTEMD: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// Where the daemon sends its spans; among these are headers with tokens.
const OF_TRACING: &str = "OTEL_";

/// The names of the variables of this process that its children do not inherit.
pub(crate) fn private() -> Vec<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| is_private(name)).collect()
}

fn is_private(name: &str) -> bool {
    OF_SYSTEMD.contains(&name) || name.starts_with(OF_TRACING)
}

#[cfg(test)]
mod tests {
    use super::is_private;

    #[test]
    fn tokens_and_the_sockets_of_systemd_are_private() {
        for name in ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_SERVICE_NAME", "NOTIFY_SOCKET", "LISTEN_FDS"] {
            assert!(is_private(name), "{name}");
        }
        for name in ["PATH", "HTTPS_PROXY", "NOT_OTEL_", "NOTIFY"] {
            assert!(!is_private(name), "{name}");
        }
    }
}
