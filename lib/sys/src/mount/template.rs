//! Texts in mounts that refer to the mounts before them in the same list, as containerd 2.2 and later write them:
//! `{{ source N }}`, `{{ target N }}` and `{{ mount N }}` stand for the source, the target and the mount point of mount N,
//! and `{{ overlay A B }}` for the mount points from A to B (or down to B) with colons between them. containerd reads them
//! as templates of Go; this much of those is in use, and no more is understood.

/// A mount that was made before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Earlier {
    /// Its source.
    pub source: String,
    /// Its target.
    pub target: String,
    /// Where it is.
    pub point: String,
}

/// Fills in what stands in double braces.
///
/// # Errors
/// What is wrong with the text.
pub fn fill_in(text: &str, earlier: &[Earlier]) -> Result<String, String> {
    let (mut rest, mut filled) = (text, String::new());
    while let Some((before, after)) = rest.split_once("{{") {
        let (action, after) = after.split_once("}}").ok_or("unclosed action")?;
        filled.push_str(before);
        filled.push_str(&carry_out(action, earlier)?);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

fn carry_out(action: &str, earlier: &[Earlier]) -> Result<String, String> {
    let words: Vec<&str> = action.split_whitespace().collect();
    let number = |word: &str| word.parse::<i64>().map_err(|_| format!("{word:?} is no number"));
    let bounds = |index: i64| format!("index out of bounds: {index}, has {} active mounts", earlier.len());
    let at = |word: &str| {
        let index = number(word)?;
        let found = usize::try_from(index).ok().and_then(|index| earlier.get(index));
        found.ok_or_else(|| bounds(index))
    };
    match words.as_slice() {
        ["source", index] => Ok(at(index)?.source.clone()),
        ["target", index] => Ok(at(index)?.target.clone()),
        ["mount", index] => Ok(at(index)?.point.clone()),
        ["overlay", start, end] => {
            let (start, end) = (number(start)?, number(end)?);
            let range = || format!("invalid range: {start}-{end}, has {} active mounts", earlier.len());
            let (low, high) = (start.min(end), start.max(end));
            let found = usize::try_from(low).ok().zip(usize::try_from(high).ok());
            let found = found.and_then(|(low, high)| earlier.get(low..=high)).ok_or_else(range)?;
            let mut points: Vec<_> = found.iter().map(|mount| mount.point.as_str()).collect();
            if start > end {
                points.reverse();
            }
            Ok(points.join(":"))
        }
        [name, ..] => Err(format!("function {name:?} not defined")),
        [] => Err("missing value for command".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_in_braces_are_filled_in() {
        let earlier: Vec<_> = (0..3)
            .map(|index| Earlier {
                source: format!("/s{index}"),
                target: format!("/t{index}"),
                point: format!("/m{index}"),
            })
            .collect();
        let good = [
            ("plain", "plain"),
            ("{{ source 0 }}", "/s0"),
            ("{{target 1}}", "/t1"),
            ("lowerdir={{ mount 2 }}:x", "lowerdir=/m2:x"),
            ("{{ overlay 0 2 }}", "/m0:/m1:/m2"),
            ("{{ overlay 2 0 }}|{{ overlay 1 1 }}", "/m2:/m1:/m0|/m1"),
        ];
        for (text, filled) in good {
            assert_eq!(fill_in(text, &earlier).unwrap(), filled);
        }
        let bad = [
            ("{{ mount 3 }}", "index out of bounds: 3, has 3 active mounts"),
            ("{{ source -1 }}", "index out of bounds: -1, has 3 active mounts"),
            ("{{ overlay 0 3 }}", "invalid range: 0-3, has 3 active mounts"),
            ("{{ overlay 1 -1 }}", "invalid range: 1--1, has 3 active mounts"),
            ("{{ mount x }}", "\"x\" is no number"),
            ("{{ mount", "unclosed action"),
            ("{{ }}", "missing value for command"),
            ("{{ printf 1 }}", "function \"printf\" not defined"),
        ];
        for (text, reason) in bad {
            assert_eq!(fill_in(text, &earlier).unwrap_err(), reason);
        }
    }
}
