//! The last word on the error stream: a metav1.Status from protocol v4 on, plain text before.

use serde_json::json;

use super::request::Protocol;

/// Longest message, bytes: a command line can be megabytes.
const MESSAGE_LIMIT: usize = 4096;

/// How a session ended, as its client hears of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Success,
    /// The command ran and gave this exit code.
    ExitCode {
        cmd: String,
        code: i32,
    },
    /// It did not run, or nobody knows how it ended.
    Failure(String),
}

impl Verdict {
    /// The bytes for the error stream; empty: nothing to say.
    pub fn bytes(&self, protocol: Protocol) -> Vec<u8> {
        let value = match self {
            Verdict::Success if protocol.has_status() => json!({"metadata": {}, "status": "Success"}),
            Verdict::Success => return Vec::new(),
            _ if !protocol.has_status() => return self.message().into_bytes(),
            Verdict::ExitCode { code, .. } => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.message(),
                "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Verdict::Failure(_) => json!({
                "metadata": {},
                "status": "Failure",
                "message": format!("Internal error occurred: {}", self.message()),
                "reason": "InternalError",
                "details": {"causes": [{"message": self.message()}]},
                "code": 500,
            }),
        };
        value.to_string().into_bytes()
    }

    /// In the words of the Go servers, which scripts may look for.
    fn message(&self) -> String {
        let mut text = match self {
            Verdict::Success => String::new(),
            Verdict::ExitCode { cmd, code } => {
                let cmd = cut(cmd.clone());
                format!("command terminated with non-zero exit code: error executing command [{cmd}], exit code {code}")
            }
            Verdict::Failure(words) => words.clone(),
        };
        if text.len() > 2 * MESSAGE_LIMIT {
            text = cut(text);
        }
        text
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MESSAGE_LIMIT {
        let at = (0..=MESSAGE_LIMIT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(at);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(verdict: &Verdict) -> serde_json::Value {
        serde_json::from_slice(&verdict.bytes(Protocol::V4)).unwrap()
    }

    #[test]
    fn status_from_v4_on() {
        assert_eq!(value(&Verdict::Success), json!({"metadata": {}, "status": "Success"}));
        let exit = value(&Verdict::ExitCode { cmd: "sh -c".into(), code: 7 });
        assert_eq!((&exit["status"], &exit["reason"]), (&json!("Failure"), &json!("NonZeroExitCode")));
        assert_eq!(exit["details"]["causes"], json!([{"reason": "ExitCode", "message": "7"}]));
        assert_eq!(exit["message"], "command terminated with non-zero exit code: error executing command [sh -c], exit code 7");
        let failure = value(&Verdict::Failure("no such file".into()));
        assert_eq!((&failure["reason"], &failure["code"]), (&json!("InternalError"), &json!(500)));
        assert!(failure["details"]["causes"][0].get("reason").is_none());
    }

    #[test]
    fn text_before() {
        for protocol in [Protocol::V1, Protocol::V2, Protocol::V3] {
            assert_eq!(Verdict::Success.bytes(protocol), b"");
            assert_eq!(Verdict::Failure("no".into()).bytes(protocol), b"no");
            assert!(Verdict::ExitCode { cmd: "a".into(), code: 3 }.bytes(protocol).ends_with(b"exit code 3"));
        }
    }

    #[test]
    fn long_commands_are_cut() {
        let verdict = Verdict::ExitCode { cmd: "ä".repeat(1 << 20), code: 7 };
        assert!(verdict.bytes(Protocol::V4).len() < 8192);
        assert!(verdict.bytes(Protocol::V1).ends_with("…], exit code 7".as_bytes()));
    }
}
