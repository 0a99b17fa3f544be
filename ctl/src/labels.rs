//! The labels that `davit` keeps on its containers, beside those of the user and of containerd's clients.

/// The container's name. containerd's API knows none, so that it is unique only among what `davit` makes.
pub(crate) const NAME: &str = "davit/name";
/// The file that the container's output goes to. Absent: the output went to the terminal of `davit run`.
pub(crate) const LOG: &str = "davit/log";
/// How the log is rotated, as the address of a json log says it; absent for not at all.
pub(crate) const LOG_OPTIONS: &str = "davit/log-options";
/// The folder of the FIFOs of a container in the foreground whose client has left it alone.
pub(crate) const FIFOS: &str = "davit/fifos";
/// The folder of the files that the container has in its `/etc`.
pub(crate) const ETC: &str = "davit/etc";
/// Set when the container's standard input stays open without a client (`run -d -i`).
pub(crate) const STDIN: &str = "davit/stdin";
/// Whether the daemon is to start the container again (`--restart`).
pub(crate) const RESTART: &str = "davit/restart";
/// The exit code of a container whose task is gone.
pub(crate) const EXIT_CODE: &str = "davit/exit-code";
/// When it exited, RFC 3339.
pub(crate) const EXITED_AT: &str = "davit/exited-at";
/// The signal that asks the container to stop, under containerd's name for it.
pub(crate) const STOP_SIGNAL: &str = "io.containerd.image.config.stop-signal";

/// Whether an image's own label may become a container's. Those that daemons and clients act upon may not: an image
/// could otherwise choose where a log is written or when a container is restarted (CVE-2026-53488).
pub(crate) fn may_come_from_an_image(key: &str) -> bool {
    const RESERVED: [&str; 6] =
        ["davit/", "davit.", "containerd.io/", "io.containerd.", "io.cri-containerd", "nerdctl/"];
    !RESERVED.iter().any(|prefix| key.starts_with(prefix))
}

/// Whether a label is the user's own, to be shown as such.
pub(crate) fn is_users(key: &str) -> bool {
    may_come_from_an_image(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_cannot_set_what_is_acted_upon() {
        for key in [NAME, LOG, STOP_SIGNAL, "containerd.io/restart.loguri", "nerdctl/log-uri"] {
            assert!(!may_come_from_an_image(key), "{key}");
        }
        assert!(may_come_from_an_image("maintainer"));
        assert!(may_come_from_an_image("org.opencontainers.image.title"));
    }
}
