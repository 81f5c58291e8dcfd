//! Walking along the words of a command line, on top of lexopt.

use std::ffi::OsString;

use lexopt::{Arg, Parser};

use super::help::Topic;

/// Why there is no command to run.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// Help was asked for: of a command, or in general.
    Help(Option<&'static Topic>),
    /// `--version`
    Version,
    /// The line is wrong.
    Usage(String),
}

impl From<String> for Stop {
    fn from(message: String) -> Stop {
        Stop::Usage(message)
    }
}

impl From<lexopt::Error> for Stop {
    fn from(error: lexopt::Error) -> Stop {
        Stop::Usage(error.to_string())
    }
}

/// One word of the line.
pub enum Word {
    /// `-x` or `--long`
    Flag(String),
    Value(String),
    /// All after `--`.
    Rest(Vec<String>),
}

/// The words that are left, without the flags of every command, which are kept here.
pub struct Words {
    parser: Parser,
    /// The command, once it has been read.
    pub topic: Option<&'static Topic>,
    /// `--socket`
    pub socket: Option<String>,
    /// `--output json`
    pub json: Option<bool>,
}

impl Words {
    pub fn new<I>(words: I) -> Words
    where
        I: IntoIterator<Item = OsString>,
        I::IntoIter: 'static,
    {
        Words { parser: Parser::from_args(words), topic: None, socket: None, json: None }
    }

    /// The next word; flags of every command are taken on the way.
    pub fn read(&mut self) -> Result<Option<Word>, Stop> {
        loop {
            if self.parser.try_raw_args().is_some_and(|raw| raw.peek().is_some_and(|word| word == "--")) {
                let mut rest = self.rest()?;
                rest.remove(0);
                return Ok(Some(Word::Rest(rest)));
            }
            let flag = match self.parser.next()? {
                None => return Ok(None),
                Some(Arg::Value(value)) => return Ok(Some(Word::Value(utf8(value)?))),
                Some(Arg::Short(letter)) => format!("-{letter}"),
                Some(Arg::Long(name)) => format!("--{name}"),
            };
            match flag.as_str() {
                "-h" | "--help" => return Err(Stop::Help(self.topic)),
                "-V" | "--version" if self.topic.is_none() => return Err(Stop::Version),
                "-s" | "--socket" => self.socket = Some(self.value()?),
                "-o" | "--output" => match self.value()?.as_str() {
                    "json" => self.json = Some(true),
                    "table" => self.json = Some(false),
                    other => return Err(self.wrong(&format!("unknown output {other:?}; expected table or json"))),
                },
                _ => return Ok(Some(Word::Flag(flag))),
            }
        }
    }

    /// The value of the flag that was just read.
    pub fn value(&mut self) -> Result<String, Stop> {
        utf8(self.parser.value()?)
    }

    /// All words that are left, as they are.
    pub fn rest(&mut self) -> Result<Vec<String>, Stop> {
        self.parser.raw_args()?.map(utf8).collect()
    }

    /// Reads flags and values to the end; `take` answers whether it knows the flag. At least one value, called `what`
    /// in the error, must be there.
    pub fn values(&mut self, what: &str, mut take: impl FnMut(&str, &mut Words) -> Result<bool, Stop>) -> Result<Vec<String>, Stop> {
        let mut values = Vec::new();
        while let Some(word) = self.read()? {
            match word {
                Word::Value(value) => values.push(value),
                Word::Rest(rest) => values.extend(rest),
                Word::Flag(flag) if take(&flag, self)? => {}
                Word::Flag(flag) => return Err(self.unknown(&flag)),
            }
        }
        match values.iter().any(String::is_empty) || values.is_empty() {
            true => Err(self.wrong(&format!("no {what}"))),
            false => Ok(values),
        }
    }

    /// Reads flags to the end; a value is an error.
    pub fn flags(&mut self, mut take: impl FnMut(&str, &mut Words) -> Result<bool, Stop>) -> Result<(), Stop> {
        while let Some(word) = self.read()? {
            match word {
                Word::Flag(flag) if take(&flag, self)? => {}
                Word::Flag(flag) => return Err(self.unknown(&flag)),
                Word::Value(value) => self.only(vec![value])?,
                Word::Rest(rest) => self.only(rest)?,
            }
        }
        Ok(())
    }

    /// Reads flags to the end: `-q` or none.
    pub fn quiet(&mut self) -> Result<bool, Stop> {
        let mut quiet = false;
        self.flags(|flag, _| {
            let known = matches!(flag, "-q" | "--quiet");
            quiet |= known;
            Ok(known)
        })?;
        Ok(quiet)
    }

    /// An error if there is one value too many.
    pub fn only(&self, more: Vec<String>) -> Result<(), Stop> {
        more.first().map_or(Ok(()), |value| Err(self.wrong(&format!("unexpected {value:?}"))))
    }

    /// The error for a flag that the command does not have.
    pub fn unknown(&self, flag: &str) -> Stop {
        self.wrong(&format!("unknown flag {flag}"))
    }

    /// The error for a line that the command cannot make sense of.
    pub fn wrong(&self, message: &str) -> Stop {
        Stop::Usage(match self.topic {
            Some(topic) => format!("{name}: {message}; crisp {name} --help says more", name = topic.name),
            None => format!("{message}; crisp --help says more"),
        })
    }
}

fn utf8(word: OsString) -> Result<String, Stop> {
    word.into_string().map_err(|word| Stop::Usage(format!("{word:?} is not UTF-8")))
}
