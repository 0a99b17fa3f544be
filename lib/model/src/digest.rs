//! Digests: the names of content (OCI image spec, "Digests").

use std::fmt;
use std::str::FromStr;

/// The hash algorithms that the content store accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, the canonical one.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// The name before the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// The number of hexadecimal digits after the colon.
    pub fn hex_len(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }
}

impl FromStr for Algorithm {
    type Err = DigestError;

    fn from_str(name: &str) -> Result<Self, DigestError> {
        match name {
            "sha256" => Ok(Algorithm::Sha256),
            "sha512" => Ok(Algorithm::Sha512),
            _ => Err(DigestError::Algorithm { algorithm: name.to_owned() }),
        }
    }
}

/// A digest, valid by construction: `sha256:` and 64 lower-case hexadecimal digits, or `sha512:` and 128.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    text: Box<str>,
}

/// Why a text is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// No `algorithm:hex` form, or a character or length that the algorithm does not allow.
    #[error("invalid digest {text:?}: want <algorithm>:<lower-case hex>")]
    Format {
        /// What was given.
        text: String,
    },
    /// An algorithm that the store does not keep.
    #[error("unsupported digest algorithm {algorithm:?}: want sha256 or sha512")]
    Algorithm {
        /// The algorithm that was named.
        algorithm: String,
    },
}

impl Digest {
    /// The digest whose hash bytes are given.
    ///
    /// # Errors
    /// [`DigestError::Format`] when the number of bytes is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Result<Digest, DigestError> {
        let mut text = String::with_capacity(algorithm.as_str().len() + 1 + bytes.len() * 2);
        text.push_str(algorithm.as_str());
        text.push(':');
        for byte in bytes {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
            }
        }
        if bytes.len() * 2 != algorithm.hex_len() {
            return Err(DigestError::Format { text });
        }
        Ok(Digest { algorithm, text: text.into() })
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.text[self.algorithm.as_str().len() + 1..]
    }

    /// The whole text, `algorithm:hex`.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let format = || DigestError::Format { text: text.to_owned() };
        let (algorithm, hex) = text.split_once(':').ok_or_else(format)?;
        if algorithm.is_empty() || hex.is_empty() {
            return Err(format());
        }
        let algorithm: Algorithm = algorithm.parse()?;
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if hex.len() != algorithm.hex_len() || !hex.bytes().all(is_hex) {
            return Err(format());
        }
        Ok(Digest { algorithm, text: text.into() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn parses_and_prints_the_same() {
        let digest: Digest = EMPTY.parse().unwrap();
        assert_eq!(digest.algorithm(), Algorithm::Sha256);
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(digest.hex(), &EMPTY[7..]);
        let bytes: Vec<u8> =
            (0..32).map(|i| u8::from_str_radix(&digest.hex()[i * 2..i * 2 + 2], 16).unwrap()).collect();
        assert_eq!(Digest::from_bytes(Algorithm::Sha256, &bytes).unwrap(), digest);
    }

    #[test]
    fn refuses_what_is_none() {
        let upper = EMPTY.to_uppercase().replace("SHA256", "sha256");
        let bad =
            ["", ":", "sha256:", "sha256", EMPTY.trim_end_matches('5'), &upper, "md5:00", "sha256:../../etc"];
        for text in bad {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
