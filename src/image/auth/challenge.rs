//! The challenges registries answer with (WWW-Authenticate).

use std::collections::BTreeMap;

/// One challenge of a WWW-Authenticate header: scheme and parameter names in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    pub scheme: String,
    pub parameters: BTreeMap<String, String>,
}

/// Parses WWW-Authenticate (RFC 9110, 11.6.1). What cannot be understood is skipped.
pub fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return found;
        }
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 {
            // No token where one must be: skip a character and look on.
            rest = &rest[rest.chars().next().map_or(1, char::len_utf8)..];
            continue;
        }
        let (token, after) = rest.split_at(end);
        let Some(value) = after.trim_start().strip_prefix('=') else {
            found.push(Challenge { scheme: token.to_ascii_lowercase(), parameters: BTreeMap::new() });
            rest = after;
            continue;
        };
        let value = value.trim_start();
        let (text, after) = if let Some(quoted) = value.strip_prefix('"') {
            unquote(quoted)
        } else {
            let end = value.find([',', ' ', '\t']).unwrap_or(value.len());
            (value[..end].to_owned(), &value[end..])
        };
        if let Some(challenge) = found.last_mut() {
            challenge.parameters.entry(token.to_ascii_lowercase()).or_insert(text);
        }
        rest = after;
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c)
}

/// The text up to the closing quote, and what follows it.
fn unquote(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return (out, &text[i + 1..]),
            '\\' => out.extend(chars.next().map(|(_, c)| c)),
            c => out.push(c),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter<'a>(c: &'a Challenge, key: &str) -> &'a str {
        c.parameters.get(key).map_or("", String::as_str)
    }

    #[test]
    fn challenges() {
        let all = parse_challenges(r#"Bearer realm="https://a/t?x=1,2",service="s \"q\"",Scope=repository:a:pull , Basic realm=x"#);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].scheme.as_str(), parameter(&all[0], "realm")), ("bearer", "https://a/t?x=1,2"));
        assert_eq!((parameter(&all[0], "service"), parameter(&all[0], "scope")), ("s \"q\"", "repository:a:pull"));
        assert_eq!((all[1].scheme.as_str(), parameter(&all[1], "realm")), ("basic", "x"));
        assert_eq!(parse_challenges("Negotiate, BASIC").len(), 2);
        assert!(parse_challenges("").is_empty());
    }

    proptest::proptest! {
        #[test]
        fn challenges_never_panic(text in "\\PC{0,100}") {
            parse_challenges(&text);
        }

        #[test]
        fn quoted_values_come_back(value in "[a-zA-Z0-9:/?=,. ]{0,40}") {
            let all = parse_challenges(&format!("Bearer realm=\"{value}\",service=\"s\""));
            proptest::prop_assert_eq!(parameter(&all[0], "realm"), value);
        }
    }
}
