//! The keys that leave a process alone with its terminal: ctrl-p ctrl-q, unless others are asked for.

use std::str::FromStr;

/// Docker's.
pub(crate) const DEFAULT: &str = "ctrl-p,ctrl-q";

/// Keys to be pressed one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys(Vec<u8>);

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<DetachKeys, String> {
        let key = |word: &str| {
            let key = match word.strip_prefix("ctrl-").map(str::as_bytes) {
                // The control characters are 64 places before the characters that they are named by (ascii(7)).
                Some([letter @ (b'a'..=b'z')]) => Some(letter - b'a' + 1),
                Some([sign @ (b'@' | b'['..=b'_')]) => Some(sign - b'@'),
                Some(_) => None,
                None => <[u8; 1]>::try_from(word.as_bytes()).ok().map(|[key]| key),
            };
            let hint = "want single characters, or ctrl- and one of a-z @ [ \\ ] ^ _, with commas between";
            key.ok_or_else(|| format!("{word:?} is no key: {hint}"))
        };
        text.split(',').map(key).collect::<Result<_, _>>().map(DetachKeys)
    }
}

impl DetachKeys {
    /// Begins to look for them.
    pub(crate) fn watch(self) -> Watch {
        Watch { keys: self.0, pressed: 0 }
    }
}

/// Looks for the keys in what a user types.
#[derive(Debug)]
pub(crate) struct Watch {
    keys: Vec<u8>,
    /// So many of them were pressed, and not passed on.
    pressed: usize,
}

impl Watch {
    /// Adds to `out` what is for the process, and returns true when all keys were pressed.
    pub(crate) fn feed(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for byte in typed {
            if *byte != self.keys[self.pressed] {
                // What was held back was meant for the process.
                self.give_up(out);
            }
            if *byte == self.keys[self.pressed] {
                self.pressed += 1;
                if self.pressed == self.keys.len() {
                    return true;
                }
            } else {
                out.push(*byte);
            }
        }
        false
    }

    /// Adds what was held back: no more is typed.
    pub(crate) fn give_up(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.keys[..self.pressed]);
        self.pressed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names() {
        let keys = |text: &str| text.parse::<DetachKeys>().map(|keys| keys.0);
        assert_eq!(keys(DEFAULT), Ok(vec![16, 17]));
        assert_eq!(keys("ctrl-a,d"), Ok(vec![1, b'd']));
        assert_eq!(keys("ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_"), Ok(vec![0, 27, 28, 29, 30, 31]));
        for bad in ["", "ctrl-", "ctrl-P", "ctrl-1", "ab", "a,,b", "ä"] {
            assert!(keys(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn all_but_the_keys_is_passed_on() {
        let feed = |keys: &str, typed: &[&str]| {
            let mut watch = keys.parse::<DetachKeys>().unwrap().watch();
            let mut out = Vec::new();
            let left = typed.iter().any(|typed| watch.feed(typed.as_bytes(), &mut out));
            (left, String::from_utf8(out).unwrap())
        };
        assert_eq!(feed(DEFAULT, &["ls\r\x10", "\x11more"]), (true, "ls\r".to_owned()));
        assert_eq!(feed(DEFAULT, &["\x10x\x10\x10\x11"]), (true, "\x10x\x10".to_owned()));
        assert_eq!(feed(DEFAULT, &["\x11\x10"]), (false, "\x11".to_owned()));
        assert_eq!(feed("q", &["ab", "cq"]), (true, "abc".to_owned()));
        assert_eq!(feed("a,b", &["aab"]), (true, "a".to_owned()));
        let mut watch = DEFAULT.parse::<DetachKeys>().unwrap().watch();
        let mut out = Vec::new();
        watch.feed(b"x\x10", &mut out);
        watch.give_up(&mut out);
        assert_eq!(out, b"x\x10");
    }
}
