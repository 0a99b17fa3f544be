//! Chain ids: the names of the snapshots that a stack of layers makes (OCI image spec, "Layer ChainID").

use davit_model::Digest;
use davit_model::digest::Algorithm;
use sha2::{Digest as _, Sha256};

/// The SHA-256 digest of some bytes.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Algorithm::Sha256, &Sha256::digest(bytes)).expect("SHA-256 has the length of SHA-256")
}

/// The chain id of each layer, lowest first, from the digests of the uncompressed layers: the first is the diff id
/// itself, each further one is the digest of `<parent chain id> <diff id>`.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let id = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => sha256(format!("{parent} {diff_id}").as_bytes()),
        };
        chain.push(id);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_the_diff_id_and_the_rest_hash_their_parent() {
        let one = sha256(b"one");
        let two = sha256(b"two");
        let chain = chain_ids(&[one.clone(), two.clone()]);
        assert_eq!(chain[0], one);
        assert_eq!(chain[1], sha256(format!("{one} {two}").as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn digests_of_bytes_are_sha256() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b"").as_str(), empty);
    }
}
