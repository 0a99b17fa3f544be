//! The project's one wrapper around hash functions.

use davit_model::{Algorithm, Digest};
use sha2::{Digest as _, Sha256, Sha512};

/// Computes a digest piece by piece.
#[derive(Debug, Clone)]
pub struct Hasher {
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// Starts with nothing.
    pub fn new(algorithm: Algorithm) -> Hasher {
        let state = match algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Sha512::new()),
        };
        Hasher { state }
    }

    /// The digest of one piece.
    pub fn digest_of(algorithm: Algorithm, data: &[u8]) -> Digest {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finish()
    }

    /// The algorithm it was made for.
    pub fn algorithm(&self) -> Algorithm {
        match &self.state {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Adds bytes.
    pub fn update(&mut self, data: &[u8]) {
        match &mut self.state {
            State::Sha256(hasher) => hasher.update(data),
            State::Sha512(hasher) => hasher.update(data),
        }
    }

    /// The digest of all bytes so far; more can follow.
    pub fn digest(&self) -> Digest {
        self.clone().finish()
    }

    /// The digest of all bytes.
    pub fn finish(self) -> Digest {
        let algorithm = self.algorithm();
        let digest = match self.state {
            State::Sha256(hasher) => Digest::from_bytes(algorithm, &hasher.finalize()),
            State::Sha512(hasher) => Digest::from_bytes(algorithm, &hasher.finalize()),
        };
        digest.expect("a hash has as many bytes as its algorithm says")
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_published_ones() {
        // FIPS 180-2, appendices B.1 and C.1.
        let abc = Hasher::digest_of(Algorithm::Sha256, b"abc");
        assert_eq!(abc.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let abc = Hasher::digest_of(Algorithm::Sha512, b"abc");
        assert!(abc.hex().starts_with("ddaf35a193617abacc417349ae204131"));
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(b"a");
        assert_eq!(hasher.digest(), Hasher::digest_of(Algorithm::Sha256, b"a"));
        hasher.update(b"bc");
        assert_eq!(hasher.finish(), Hasher::digest_of(Algorithm::Sha256, b"abc"));
    }
}
