//! Labels: the string pairs on every object, through which clients steer garbage collection and much else.

use std::collections::BTreeMap;

/// The labels of one object, sorted by key.
pub type Labels = BTreeMap<String, String>;

/// The most bytes that key and value of a label may have together (containerd `pkg/labels`).
pub const MAX_LABEL_SIZE: usize = 4096;

/// A label over [`MAX_LABEL_SIZE`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "label key and value length ({length} bytes) greater than maximum size ({MAX_LABEL_SIZE} bytes), key: {key}"
)]
pub struct LabelTooLong {
    /// The start of the key.
    pub key: String,
    /// The bytes of key and value together.
    pub length: usize,
}

/// Checks the size of each label.
///
/// # Errors
/// [`LabelTooLong`] for the first that is over [`MAX_LABEL_SIZE`].
pub fn validate(labels: &Labels) -> Result<(), LabelTooLong> {
    for (key, value) in labels {
        let length = key.len() + value.len();
        if length > MAX_LABEL_SIZE {
            // The key itself may be the monster: the message carries its start only, as containerd's does.
            let mut end = key.len().min(64);
            while !key.is_char_boundary(end) {
                end -= 1;
            }
            return Err(LabelTooLong { key: key[..end].to_owned(), length });
        }
    }
    Ok(())
}

/// Sets one label; an empty value removes the key (a rule of containerd's metadata store).
pub fn set(labels: &mut Labels, key: &str, value: &str) {
    if value.is_empty() {
        labels.remove(key);
    } else {
        labels.insert(key.to_owned(), value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_on_key_and_value_together() {
        let fits = Labels::from([("k".repeat(96), "v".repeat(4000))]);
        assert_eq!(validate(&fits), Ok(()));
        let over = Labels::from([("é".repeat(100), "v".repeat(4000))]);
        assert_eq!(validate(&over).unwrap_err().length, 4200);
    }

    #[test]
    fn an_empty_value_deletes() {
        let mut labels = Labels::new();
        set(&mut labels, "a", "1");
        set(&mut labels, "a", "");
        assert!(labels.is_empty());
    }
}
