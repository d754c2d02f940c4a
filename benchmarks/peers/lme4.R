# lmer or glmer in a process of its own: reads columns once, then one fit for each line of standard input.
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]
formula <- as.formula(arguments[2])
rows <- as.integer(arguments[3])
names <- strsplit(arguments[4], ",")[[1]]
suppressPackageStartupMessages(library(lme4))
columns <- lapply(names, function(name) {
  readBin(file.path(folder, paste0(name, ".bin")), "double", rows)
})
data <- as.data.frame(setNames(columns, names))
data$task <- factor(data$task)
cat("ready", as.character(packageVersion("lme4")), R.version.string, "\n", sep = "|")
flush(stdout())

# the two tolerances that help("convergence") names
tight <- list(xtol_abs = 1e-8, ftol_abs = 1e-8)
family <- arguments[6]
nodes <- as.integer(arguments[7])
control <- if (arguments[5] == "tighter") lmerControl(optCtrl = tight) else lmerControl()

peak <- function() {
  lines <- tryCatch(readLines("/proc/self/status"), error = function(e) character())
  line <- grep("^VmHWM", lines, value = TRUE)
  if (length(line)) as.numeric(gsub("[^0-9]", "", line)) / 1024 else NA
}

estimate <- function() {
  if (family == "gaussian") lmer(formula, data = data, REML = FALSE, control = control)
  else glmer(formula, data = data, family = family, nAGQ = nodes)
}

input <- file("stdin", "r")
while (length(line <- readLines(input, n = 1)) == 1) {
  seconds <- system.time(fit <- estimate())[["elapsed"]]
  covariance <- VarCorr(fit)
  # each bar without correlations is a group of its own
  tau <- unlist(lapply(covariance, function(v) attr(v, "stddev")))
  corr <- unlist(lapply(covariance, function(v) {
    r <- attr(v, "correlation")
    r[upper.tri(r)]
  }))
  values <- c(seconds, peak(), sigma(fit), logLik(fit), fixef(fit), tau, corr)
  cat(paste(sprintf("%.17g", values), collapse = " "), "\n", sep = "")
  flush(stdout())
}
