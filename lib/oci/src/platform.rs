//! Platforms, in Go's words (`linux/arm64/v8`), and which manifest of an index runs here.

use std::fmt;

use davit_model::{Coded, ErrorCode};
use serde::{Deserialize, Serialize};

use crate::image::{Descriptor, ImageConfig};

/// What a manifest runs on (image spec, "Image Index").
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// The CPU architecture, such as `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// The operating system.
    #[serde(default)]
    pub os: String,
    /// The CPU's variant; empty when there is none or it is the usual one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// What Go calls operating systems and architectures, as far as a word for a platform can be one of them.
const SYSTEMS: [&str; 4] = ["darwin", "freebsd", "linux", "windows"];
const ARCHITECTURES: [&str; 15] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mipsle", "mips64", "mips64le", "ppc64", "ppc64le",
    "riscv64", "s390x", "sparc64", "wasm",
];

/// A platform that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid platform {text:?}: want os/architecture or os/architecture/variant, such as linux/arm64")]
pub struct PlatformError {
    /// What was given.
    pub text: String,
}

impl Coded for PlatformError {
    fn code(&self) -> ErrorCode {
        ErrorCode::InvalidArgument
    }
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Platform {
        Platform {
            architecture: go_architecture(std::env::consts::ARCH).to_owned(),
            os: "linux".to_owned(),
            variant: String::new(),
        }
        .normalized()
    }

    /// The platform that an image's configuration names.
    pub fn of(config: &ImageConfig) -> Platform {
        Platform {
            architecture: config.architecture.clone(),
            os: config.os.clone(),
            variant: config.variant.clone().unwrap_or_default(),
        }
    }

    /// Parses `os/architecture[/variant]`, or one word, which is an operating system or an architecture of the host's.
    ///
    /// # Errors
    /// [`PlatformError`] when there are more parts, an empty one, a strange character, or one word that is neither.
    pub fn parse(text: &str) -> Result<Platform, PlatformError> {
        let error = || PlatformError { text: text.to_owned() };
        let parts: Vec<&str> = text.split('/').collect();
        let is_word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
        };
        if !parts.iter().all(is_word) {
            return Err(error());
        }
        let (os, architecture, variant) = match parts[..] {
            [os] if SYSTEMS.contains(&os) => (os, std::env::consts::ARCH, ""),
            [word] if ARCHITECTURES.contains(&go_architecture(&word.to_ascii_lowercase())) => {
                ("linux", word, "")
            }
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] => (os, architecture, variant),
            _ => return Err(error()),
        };
        let platform = Platform {
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            variant: variant.to_owned(),
        };
        Ok(platform.normalized())
    }

    /// The same platform by its usual name (`x86_64` is `amd64`, `arm64/v8` is `arm64`, `arm` is `arm/v7`).
    pub fn normalized(&self) -> Platform {
        let architecture = go_architecture(&self.architecture.to_ascii_lowercase()).to_owned();
        let mut variant = self.variant.to_ascii_lowercase();
        match architecture.as_str() {
            "arm64" if matches!(variant.as_str(), "8" | "v8" | "v8.0") => variant.clear(),
            "arm" if variant.is_empty() || variant == "7" => variant = "v7".to_owned(),
            "arm" if matches!(variant.as_str(), "5" | "6" | "8") => variant.insert(0, 'v'),
            "amd64" if variant == "v1" => variant.clear(),
            _ => {}
        }
        Platform { architecture, os: self.os.to_ascii_lowercase(), variant }
    }

    /// Whether content for `self` runs on `host`; what does not say what it is for may.
    pub fn runs_on(&self, host: &Platform) -> bool {
        self.os.is_empty() && self.architecture.is_empty() || self.rank_on(host).is_some()
    }

    /// How well content for `self` runs on `host`: `None` for not at all, and the lower the better.
    fn rank_on(&self, host: &Platform) -> Option<u8> {
        let (content, host) = (self.normalized(), host.normalized());
        if content.os != host.os {
            return None;
        }
        let number = |variant: &str| variant.trim_start_matches('v').parse::<u8>().unwrap_or(0);
        if content.architecture == host.architecture {
            if content.variant == host.variant {
                return Some(0);
            }
            // An older variant of the same family runs on a newer CPU, the newest such one best.
            let (have, want) = (number(&host.variant), number(&content.variant));
            return (want < have || content.variant.is_empty())
                .then(|| have.saturating_sub(want).min(50) + 1);
        }
        // A 64-bit ARM runs 32-bit code on all but server cores, an amd64 runs that of a 386.
        match (host.architecture.as_str(), content.architecture.as_str()) {
            ("arm64", "arm") => Some(100 - number(&content.variant).min(50)),
            ("amd64", "386") => Some(100),
            _ => None,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// The manifest that runs best on `host`. One that names no platform is taken if nothing better is there; one for
/// `unknown` is an attestation, no image.
pub fn best<'a>(manifests: &'a [Descriptor], host: &Platform) -> Option<&'a Descriptor> {
    let rank = |descriptor: &Descriptor| match &descriptor.platform {
        None => Some(u8::MAX),
        Some(platform) if platform.os.is_empty() && platform.architecture.is_empty() => Some(u8::MAX),
        Some(platform) => platform.rank_on(host),
    };
    manifests
        .iter()
        .filter_map(|descriptor| rank(descriptor).map(|rank| (rank, descriptor)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, descriptor)| descriptor)
}

/// Whether a manifest is for one of `platforms`, runs on it as an older variant, or does not say what it is for. No
/// platforms are all.
pub fn is_wanted(manifest: &Descriptor, platforms: &[Platform]) -> bool {
    let Some(content) = &manifest.platform else { return true };
    let is_for = |platform: &Platform| {
        content.normalized().architecture == platform.normalized().architecture
            && content.rank_on(platform).is_some()
    };
    platforms.is_empty() || platforms.iter().any(is_for)
}

/// Sorts manifests by the first of `platforms` that each runs on, and by how well; those that do not say what they are
/// for come last. No platforms are no order.
pub fn prefer(manifests: &mut [Descriptor], platforms: &[Platform]) {
    manifests.sort_by_key(|manifest| {
        let rank = |platform: &Platform| manifest.platform.as_ref()?.rank_on(platform);
        let ranks =
            platforms.iter().enumerate().filter_map(|(place, platform)| Some((place, rank(platform)?)));
        ranks.min().unwrap_or((usize::MAX, 0))
    });
}

/// The name that Go, and with it every image, has for an architecture that `uname` or Rust names otherwise.
fn go_architecture(name: &str) -> &str {
    match name {
        "x86_64" | "x86-64" => "amd64",
        "x86" | "i386" | "i686" => "386",
        "aarch64" => "arm64",
        "armhf" => "arm",
        "powerpc64le" | "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::sha256;

    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        platforms
            .iter()
            .map(|text| {
                let mut descriptor = Descriptor::new("m", sha256(text.as_bytes()), 1);
                descriptor.platform = (!text.is_empty()).then(|| Platform::parse(text).unwrap());
                descriptor
            })
            .collect()
    }

    fn chosen(platforms: &[&str], host: &str) -> Option<usize> {
        let manifests = index(platforms);
        let best = best(&manifests, &Platform::parse(host).unwrap())?;
        manifests.iter().position(|descriptor| descriptor.digest == best.digest)
    }

    #[test]
    fn the_best_manifest_of_an_index() {
        assert_eq!(chosen(&["linux/arm64", "linux/amd64"], "linux/amd64"), Some(1));
        assert_eq!(chosen(&["linux/386", "linux/amd64"], "linux/amd64"), Some(1));
        assert_eq!(chosen(&["linux/arm/v5", "linux/arm/v6", "linux/s390x"], "linux/arm/v7"), Some(1));
        assert_eq!(chosen(&["linux/arm/v7", "linux/arm64/v8"], "linux/arm64"), Some(1));
        assert_eq!(chosen(&["linux/arm/v6", "linux/arm/v7"], "linux/arm64"), Some(1));
        assert_eq!(chosen(&["linux/amd64/v3"], "linux/amd64"), None);
        assert_eq!(chosen(&["windows/amd64", "linux/arm64"], "linux/amd64"), None);
        assert_eq!(chosen(&["unknown/unknown", "linux/amd64"], "linux/amd64"), Some(1));
        assert_eq!(chosen(&["", "linux/amd64"], "linux/amd64"), Some(1));
        assert_eq!(chosen(&["", "linux/arm64"], "linux/amd64"), Some(0));
    }

    #[test]
    fn what_is_wanted_of_an_index() {
        let manifests = index(&["linux/amd64", "linux/386", "linux/arm/v6", "", "unknown/unknown"]);
        let wanted = |platforms: &[&str]| -> Vec<usize> {
            let platforms: Vec<Platform> =
                platforms.iter().map(|text| Platform::parse(text).unwrap()).collect();
            (0..manifests.len()).filter(|index| is_wanted(&manifests[*index], &platforms)).collect()
        };
        assert_eq!(wanted(&[]), [0, 1, 2, 3, 4]);
        assert_eq!(wanted(&["linux/amd64"]), [0, 3]);
        assert_eq!(wanted(&["linux/arm/v7", "linux/386"]), [1, 2, 3]);
        assert_eq!(wanted(&["linux/arm64"]), [3]);
        let mut sorted = manifests.clone();
        prefer(&mut sorted, &["linux/arm/v6", "linux/amd64"].map(|text| Platform::parse(text).unwrap()));
        let order = [2, 0, 1, 3, 4].map(|index: usize| manifests[index].clone());
        assert_eq!(sorted, order);
    }

    #[test]
    fn parses_and_normalises() {
        for (given, want) in [
            ("linux/x86_64", "linux/amd64"),
            ("aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("Linux/AMD64", "linux/amd64"),
        ] {
            assert_eq!(Platform::parse(given).unwrap().to_string(), want);
        }
        assert_eq!(Platform::parse("linux").unwrap(), Platform::host());
        let amd64 = Platform::parse("linux/amd64").unwrap();
        assert!(Platform::parse("386").unwrap().runs_on(&amd64));
        assert!(!Platform::parse("arm64").unwrap().runs_on(&amd64));
        let unsaid = Platform { os: String::new(), architecture: String::new(), variant: String::new() };
        assert!(unsaid.runs_on(&amd64));
        for bad in ["", "a/", "a/b/c/d", "a b", "foo"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }
}
